"""Coverage-guided fuzzing of the checkpoint reader by atheris: how many inputs, and what was found.

    python benchmarks/fuzz.py --seconds 1800

begins with small checkpoints of every way of storing, stops at the first finding, and keeps its input beside the
result.  What is tried, and what counts as a finding, is in tests/fuzz/targets.py.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "cli")]

SLOW_SECONDS = 5
MAX_INPUT_BYTES = 16384
COUNTS = "counts.json"
COUNT_EVERY = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=1800)
    parser.add_argument("--inputs", type=int, default=-1, help="Stop after so many; -1 for as many as time allows.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--memory", type=Path, default=None, help="A folder in memory, such as /dev/shm.")
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    arguments, options = parser.parse_known_args()
    if arguments.worker:
        work(arguments.worker, options)
        return
    from common import save_result

    from tests.fuzz.seeds import fuzz_inputs

    with tempfile.TemporaryDirectory(dir=arguments.memory) as name:
        folder = Path(name)
        (folder / "corpus").mkdir()
        inputs = fuzz_inputs(folder / "seeds")
        for number, data in enumerate(inputs):
            (folder / "corpus" / f"seed-{number:04d}").write_bytes(data)
        command = [
            *(sys.executable, __file__, "--worker", folder, f"-seed={arguments.seed}"),
            *(f"-max_total_time={arguments.seconds}", f"-runs={arguments.inputs}", f"-timeout={SLOW_SECONDS}"),
            *(f"-max_len={MAX_INPUT_BYTES}", f"-artifact_prefix={folder}/finding-", "-print_final_stats=1"),
            folder / "corpus",
        ]
        process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("#") and ("pulse" in line or "DONE" in line):
                print(line, end="", flush=True)
        code = process.wait()
        counts = json.loads((folder / COUNTS).read_text())
        findings = sorted(folder.glob("finding-*"))
        kept = [Path(shutil.copy(finding, Path.cwd())).name for finding in findings]
    text = "".join(lines)
    if code or kept:
        print(text[-8000:], file=sys.stderr)
    states = re.findall(r"^#(\d+)\s+\S+\s+cov: (\d+) ft: (\d+) corp: (\d+)", text, re.MULTILINE)
    figures = {
        "seed": arguments.seed,
        "seconds": arguments.seconds,
        "inputs": int(re.findall(r"stat::number_of_executed_units: (\d+)", text)[-1]),
        "counted": counts,
        "seeds": len(inputs),
        "edges_covered": int(states[-1][1]),
        "features": int(states[-1][2]),
        "corpus": int(states[-1][3]),
        "slow_seconds": SLOW_SECONDS,
        "max_input_bytes": MAX_INPUT_BYTES,
        "findings": kept,
        "exit_code": code,
        "atheris": version("atheris"),
    }
    print(save_result("fuzz", figures), figures)
    sys.exit(bool(code or kept))


def work(folder: Path, options: list[str]) -> None:
    """Run the fuzzer in this process; it ends the process."""
    import atheris
    import torch

    torch.set_num_threads(1)
    with atheris.instrument_imports(include=["cospadi.formats", "cospadi.formats.factorization", "cospadi_cli"]):
        from tests.fuzz.targets import Reader, mutated
    reader = Reader(folder / "files")

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = mutated(data, rng) if rng.random() < 0.6 else None
        return changed if changed and len(changed) <= max_size else atheris.Mutate(data, max_size)

    def run(data: bytes) -> None:
        reader.run(data)
        # libFuzzer ends the process without a word to Python, so that the counts are written now and then.
        if (reader.accepted + reader.refused) % COUNT_EVERY == 1:
            (folder / COUNTS).write_text(json.dumps({"accepted": reader.accepted, "refused": reader.refused}))

    atheris.Setup([sys.argv[0], *options], run, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
