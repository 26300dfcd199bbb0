"""How right the time left is: the events of real runs are replayed, and what was foretold compared with what came.

    cospadi-cli compress --events run.jsonl ...
    python benchmarks/progress.py run.jsonl [more.jsonl ...]

After a tenth, a quarter and half of the time of a stage, the error of the time left then shown, in parts of the time
that was really left.
"""

import argparse
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from common import save_result

from cospadi import events
from cospadi.events import Event, Progress
from cospadi.pipeline import TimeLeft

PARTS = (0.1, 0.25, 0.5)
_KINDS: dict[str, Any] = {
    kind.event: kind for kind in vars(events).values() if isinstance(kind, type) and hasattr(kind, "event")
}

Timed = tuple[float, Event]


def read(path: Path, clock: str) -> list[Timed]:
    """Give the events of a file with their times in seconds."""
    found: list[Timed] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        data = json.loads(line)
        times = {
            "wall": datetime.fromisoformat(data.pop("time").replace("Z", "+00:00")).timestamp(),
            "cpu": data.pop("cpu_seconds"),
        }
        found.append((times[clock], _KINDS[data.pop("event")](**data)))
    return found


def judge(found: Sequence[Timed]) -> list[dict[str, Any]]:
    """Give the seconds of each stage, and the relative error of the time left at each of ``PARTS``.

    None stands for a time that was not known yet.  Units that were taken over from an earlier run take no part.
    """
    results = []
    for stage in dict.fromkeys(event.stage for _, event in found if isinstance(event, Progress)):
        mine = [
            (index, event.done)
            for index, (_, event) in enumerate(found)
            if isinstance(event, Progress) and event.stage == stage and not event.resumed
        ]
        if len(mine) < 2:
            continue
        index, done = mine[0]
        start = index if done == 0 or index == 0 else index - 1
        begin, end = found[start][0], found[mine[-1][0]][0]
        errors: dict[str, float | None] = {}
        for part in PARTS:
            now = begin + part * (end - begin)
            estimate = TimeLeft(found[0][0])
            for time, event in found:
                if time <= now:
                    estimate.observe(event, time)
            left = estimate.left(now)
            errors[f"{part:.0%}"] = None if left is None else left / (end - now) - 1
        results.append({"stage": stage, "steps": len(mine), "seconds": end - begin, "errors": errors})
    return results


def main() -> None:
    """Judge the files that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: the time of the driving process, for runs of one worker on a machine with other work",
    )
    arguments = parser.parse_args()
    runs = {path.stem: judge(read(path, arguments.clock)) for path in arguments.files}
    for name, stages in runs.items():
        print(f"{name}: error of the time left")
        for row in stages:
            cells = (f"{part} {'unknown' if e is None else f'{e:+.1%}'}" for part, e in row["errors"].items())
            print(f"  {row['stage']:12} {row['seconds']:8.1f} s in {row['steps']:4} steps:  {',  '.join(cells)}")
    print(save_result("progress", {"clock": arguments.clock, "runs": runs}))


if __name__ == "__main__":
    main()
