"""Peak resident memory of one compression, against what one block, its Grams and its activations need.

    python benchmarks/memory.py MODEL --name llama-7b-shapes --compare -- --max-memory 8GiB --samples 16

What follows ``--`` are options of ``cospadi-cli compress``, which runs in a process of its own and is watched from
outside (Linux).  The evaluation is left out unless the options ask for it.  ``--compare`` also runs without
--max-memory and compares every file of the results.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import save_result
from transformers import AutoConfig

from cospadi.models import map_model, model_class

GOAL = 1.5
EVERY = 0.05
"""Seconds between two looks.  The kernel keeps the main process's own peak; sums over processes can miss a spike."""
IMPORTS = "import cospadi, cospadi.pipeline.stages, cospadi_cli.main, transformers.models.llama.modeling_llama"


@dataclass
class Peak:
    """The most that was seen of each figure, in bytes, over a process and its descendants.

    Attributes
    ----------
    main : int
        Resident memory of the main process alone, by the kernel's own account (VmHWM).
    resident : int
        Sum over the processes; pages that they share count for each.
    anonymous, file, shared : int
        Its parts: heap and stack; pages of mapped files, which the kernel can drop at any time; shared memory.
    processes : int
    seconds : float
        When ``resident`` was largest, from the start.
    """

    main: int = 0
    resident: int = 0
    anonymous: int = 0
    file: int = 0
    shared: int = 0
    processes: int = 0
    seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--name", required=True, help="the result is benchmarks/results/memory-NAME.json")
    parser.add_argument("--compare", action="store_true", help="also run without --max-memory")
    parser.add_argument("--scratch", type=Path, help="folder for the outputs, which are deleted; default: temporary")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, options = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    if "--eval-tokens" not in options:
        options += ["--eval-tokens", "0"]
    figures: dict[str, Any] = {"model": args.model.name, "options": options, "needs": needs(args.model)}
    figures["baseline"] = baseline()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        run, files = measure(args.model, Path(scratch), options)
        figures["run"] = run
        if run["predicted"] is not None:  # it holds the stated activation budget
            figures |= judge(run, figures["needs"], figures["baseline"])
        print(json.dumps(figures, indent=1), flush=True)
        if args.compare:
            other, expected = measure(args.model, Path(scratch), without_limit(options))
            names = sorted(files.keys() | expected.keys())
            figures["compared"] = {
                "run": other,
                "identical": files == expected,
                "different": [name for name in names if files.get(name) != expected.get(name)],
                "sha256": {name: files[name] for name in sorted(files) if name.endswith(".safetensors")},
            }
            print(json.dumps(figures["compared"], indent=1), flush=True)
    print(save_result(f"memory-{args.name}", figures))


def needs(folder: Path) -> dict[str, int]:
    """Give the bytes of the largest block in float32 and of the Grams of its layers' inputs in float64."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = model_class(config)(config).eval()
        example = torch.zeros((1, 8), dtype=torch.int64)
    mapped = map_model(model, lambda: model(input_ids=example))
    blocks = [4 * sum(p.numel() for p in model.get_submodule(name).parameters()) for name in mapped.blocks]
    grams = [0] * len(blocks)
    for layer in mapped.layers:
        if layer.source == layer.name:
            grams[layer.block] += 8 * layer.in_features**2
    return {"block_float32": max(blocks), "grams_float64": max(grams)}


def baseline() -> int:
    """Give the peak of an interpreter that imports what a run imports, and does nothing."""
    code = f"{IMPORTS}\nprint(open('/proc/self/status').read())"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return memory_of(text)["VmHWM"]


def measure(model: Path, scratch: Path, options: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Compress once; give what was measured and the SHA-256 of every file but run.json, and delete the result."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out, events = Path(folder) / "out", Path(folder) / "events.jsonl"
        command = [sys.executable, "-m", "cospadi_cli", "compress", str(model), "-o", str(out), "--quiet"]
        command += ["--events", str(events), *options]
        begin = time.perf_counter()
        process = subprocess.Popen(command)
        peak, written = watch(process, events)
        seconds = time.perf_counter() - begin
        if process.returncode != 0:
            raise SystemExit(f"compress ended with code {process.returncode} after {seconds:.0f} s; {peak}")
        lines = events.read_text(encoding="utf-8").splitlines()
        told = [json.loads(line) for line in lines]
        predicted = [line for line in told if line["event"] == "predicted"]
        before = [json.loads(line) for line in events.read_bytes()[:written].splitlines()]
        run = {
            "seconds": seconds,
            "stages": json.loads((out / "run.json").read_text(encoding="utf-8"))["stages"],
            "peak": asdict(peak),
            # What had been finished when memory was at its peak: the stage that took it comes next.
            "peak_after": {key: before[-1].get(key) for key in ("event", "done", "total")} if before else None,
            "predicted": {key: value for key, value in predicted[-1].items() if key != "event"} if predicted else None,
        }
        return run, {
            str(path.relative_to(out)): sha256(path)
            for path in sorted(out.rglob("*"))
            if path.is_file() and path.name != "run.json"
        }


def watch(process: subprocess.Popen[Any], events: Path) -> tuple[Peak, int]:
    """Follow a process to its end; give its peak and the bytes of the events file when it was reached."""
    peak, written, begin = Peak(), 0, time.perf_counter()
    while process.poll() is None:
        seen = [memory for pid in family(process.pid) if (memory := read_memory(pid))]
        main = read_memory(process.pid)
        resident = sum(memory["VmRSS"] for memory in seen)
        if resident > peak.resident:
            peak.resident, peak.seconds = resident, time.perf_counter() - begin
            written = events.stat().st_size if events.exists() else 0
        peak.main = max(peak.main, main.get("VmHWM", 0))
        peak.anonymous = max(peak.anonymous, sum(memory["RssAnon"] for memory in seen))
        peak.file = max(peak.file, sum(memory["RssFile"] for memory in seen))
        peak.shared = max(peak.shared, sum(memory["RssShmem"] for memory in seen))
        peak.processes = max(peak.processes, len(seen))
        time.sleep(EVERY)
    return peak, written


def family(pid: int) -> list[int]:
    """Give a process and its descendants."""
    found = [pid]
    for parent in found:  # grows while it is walked
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:  # ended meanwhile
                continue
    return found


def read_memory(pid: int) -> dict[str, int]:
    """Give the memory of a process in bytes; nothing if it has ended."""
    try:
        return memory_of(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return {}


def memory_of(status: str) -> dict[str, int]:
    """Read the lines of /proc/PID/status that count kB; a process that has ended but was not waited for has none."""
    rows = (line.split() for line in status.splitlines())
    return {row[0].rstrip(":"): 1024 * int(row[1]) for row in rows if row[2:] == ["kB"]}


def judge(run: dict[str, Any], need: dict[str, int], base: int) -> dict[str, Any]:
    """Compare the peak with the goal, with the limit and with the program's own prediction."""
    predicted = run["predicted"]
    allowed = need["block_float32"] + need["grams_float64"] + predicted["activations"]
    peak = max(run["peak"]["main"], run["peak"]["resident"])
    return {
        "needed": allowed,
        "peak_over_needed": peak / allowed,
        "anonymous_over_needed": run["peak"]["anonymous"] / allowed,
        "peak_above_baseline_over_needed": (peak - base) / allowed,
        "goal": GOAL,
        "reached": peak <= GOAL * allowed,
        "peak_over_predicted": peak / predicted["peak"],
        "peak_over_limit": peak / predicted["limit"] if predicted["limit"] else None,
    }


def without_limit(options: list[str]) -> list[str]:
    """Leave --max-memory and its value out."""
    kept, rest = list[str](), iter(options)
    for option in rest:
        if option == "--max-memory":
            next(rest, None)
        elif not option.startswith("--max-memory="):
            kept.append(option)
    return kept


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


if __name__ == "__main__":
    main()
