"""The package's own checks on the GPU, each shown and stored as soon as it is known.

    python benchmarks/gpu/self_checks.py OUT.json

`cospadi-cli selftest --gpu` runs the same checks; here a time limit loses none that has ended.
"""

import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from cospadi.backends.selftest import checks, machine
from cospadi.errors import CospadiError


def main() -> None:
    """Run the checks; exit code 1 if one failed."""
    found, begun = [], time.perf_counter()
    try:
        where = machine(True)
        for one in checks(True):
            found.append(asdict(one) | {"at_seconds": round(time.perf_counter() - begun, 1)})
            worst = "" if one.worst is None else f"{one.worst:.2e} of {one.allowed:.2e}"
            print(f"{one.verdict:8s} {one.check:26s} {one.subject:12s} {one.cases:5d} {worst:22s} {one.detail[:200]}")
            Path(sys.argv[1]).write_text(json.dumps({"machine": where, "checks": found}, indent=1), encoding="utf-8")
    except CospadiError as error:
        sys.exit(str(error))
    count = Counter(one["verdict"] for one in found)
    print(f"{time.perf_counter() - begun:.0f} s", dict(count))
    sys.exit(1 if count["failed"] else 0)


if __name__ == "__main__":
    main()
