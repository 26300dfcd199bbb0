"""What every benchmark records beside its figures, and where they are kept."""

import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cospadi.reporting import machine, versions

RESULTS = Path(__file__).parent / "results"


def save_result(name: str, figures: dict[str, Any]) -> Path:
    """Write RESULTS/name.json with the command, the machine and the versions beside the figures."""
    # Files are named without their folders, which say something of the machine and nothing of the figures.
    arguments = [Path(argument).name if "/" in argument else argument for argument in sys.argv[1:]]
    result = {
        "command": " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *arguments]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path
