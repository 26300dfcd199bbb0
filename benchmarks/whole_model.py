"""Seconds to compress the whole embedded model, loading, Grams and writing included.

python benchmarks/whole_model.py --groups none [--solver htp] [--ratio 0.2] [--calibration FILE]
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from common import save_result

from cospadi.config import CalibrationConfig, CompressionConfig
from cospadi.embedded import embedded_model
from cospadi.events import BlockCalibrated
from cospadi.pipeline import compress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default="none")
    parser.add_argument("--solver", default="htp")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--calibration", help="text file; default: the package's")
    args = parser.parse_args()
    config = CompressionConfig(
        ratio=args.ratio, groups=args.groups, solver=args.solver, calibration=CalibrationConfig(text=args.calibration)
    )
    model, folder, waiting, last = embedded_model(), Path(tempfile.mkdtemp()), 0.0, time.perf_counter()
    start = last

    def listen(event) -> None:
        nonlocal waiting, last
        now = time.perf_counter()
        if isinstance(event, BlockCalibrated):  # the time since the last event went into this block's forward and Grams
            waiting += now - last
        last = now

    try:
        report = compress(model, folder / "out", config, on_event=listen)
    finally:
        shutil.rmtree(folder)
    figures = {
        "model": model.name,
        "groups": args.groups,
        "solver": args.solver,
        "seed": config.seed,
        "honest_ratio": report["totals"]["ratio"],
        "seconds": time.perf_counter() - start,
        "of_these_calibrating": waiting,
    }
    print(figures)
    save_result(f"whole_model-{args.groups}", figures)


if __name__ == "__main__":
    main()
