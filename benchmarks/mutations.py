"""Mutated checkpoints through ``load`` and ``inspect``: each is refused in one line or is the very same model.

    python benchmarks/mutations.py --count 50000

Every mutation has a number, from which alone it follows; ``--first N`` goes on where a run with the same seed ended and
adds to its result.  ``--without-checksums`` takes the file SHA256SUMS away first: then what changes numbers within what
the format allows cannot be noticed, and is counted as another model; still nothing may crash.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from common import RESULTS, save_result
from cospadi_cli.console import quieten_libraries
from cospadi_cli.main import main as command_line

import cospadi
from cospadi.errors import CheckpointError, UsageError
from cospadi.formats import CHECKSUMS, write_checksums

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.checkpoints import make_checkpoint
from tests.fuzz.folders import mutate_folder
from tests.fuzz.targets import MOST_CHARACTERS
from tests.helpers import tiny_model, token_windows

SLOW_SECONDS = 30
KINDS = [
    ("llama", "bitmask", "bfloat16", 10**9),
    ("llama-tied", "bitmask", "int4", 20_000),
    ("gpt2", "csr", "float16", 10**9),
    ("qwen3", "dense", "bfloat14", 20_000),
    ("mixtral", "bitmask", "int8", 10**9),
    ("phi3", "csr", "int8", 20_000),
    ("opt", "dense", "int6", 10**9),
    ("llama", "bitmask", "float32", 20_000),
]


class SlowError(Exception):
    """A command that takes too long."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=Path, default=None, help="A folder in memory, such as /dev/shm.")
    parser.add_argument("--without-checksums", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quieten_libraries()
    name = "mutations-without-checksums" if arguments.without_checksums else "mutations"
    counts: dict[str, Counter[str]] = {"load": Counter(), "inspect": Counter(), "mutations": Counter()}
    failures: list[str] = []
    if arguments.first:
        before = json.loads((RESULTS / f"{name}.json").read_text())
        if before["seed"] != arguments.seed or before["count"] != arguments.first:
            sys.exit(f"the result so far has seed {before['seed']} and ends before number {before['count']}")
        counts, failures = {key: Counter(before[key]) for key in counts}, before["failures"]
    with tempfile.TemporaryDirectory(dir=arguments.memory) as scratch:
        folder = Path(scratch)
        originals = make_originals(folder / "originals", not arguments.without_checksums)
        signal.signal(signal.SIGALRM, _too_slow)
        last = arguments.first + arguments.count
        for number in range(arguments.first, last):
            rng = random.Random(f"{arguments.seed}-{number}")
            original = rng.choice(originals)
            changed, names = mutate_folder(original.folder, folder / "mutated", rng, [o.folder for o in originals])
            outcomes = {"load": load_outcome(changed, original), "inspect": inspect_outcome(changed, original, number)}
            counts["mutations"].update(names)
            for what, outcome in outcomes.items():
                counts[what][outcome] += 1
                # Without checksums no reader can tell numbers from other numbers.
                if outcome.startswith(("crashed", "hung")) or (outcome == "different" and original.listed):
                    failures.append(f"{number} {original.folder.name} {what} {outcome} after {', '.join(names)}")
                    print(failures[-1], flush=True)
            shutil.rmtree(folder / "mutated")
            if (number + 1) % 1000 == 0 or number + 1 == last:
                figures: dict[str, Any] = {key: dict(sorted(value.items())) for key, value in counts.items()}
                figures |= {"seed": arguments.seed, "count": number + 1, "failures": failures}
                save_result(name, {"originals": [o.folder.name for o in originals], **figures})
                print(number + 1, figures["load"], figures["inspect"], flush=True)
    sys.exit(bool(failures))


class Original:
    """A sound checkpoint, and what loading it gives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listed = (folder / CHECKSUMS).exists()
        self.model = _contents(cospadi.load(folder))
        self.shown = {options: inspected(folder, options).stdout for options in ((), ("--json",))}


def make_originals(folder: Path, checksums: bool) -> list[Original]:
    """Write small checkpoints of every way of storing, one of them by the whole pipeline."""
    from cospadi.pipeline import compress
    from cospadi.recipe import CompressionConfig

    folders = []
    for architecture, format, value_dtype, shard_bytes in KINDS:
        path = folder / f"{architecture}-{format}-{value_dtype}"
        make_checkpoint(path, architecture, format, value_dtype, torch.bfloat16, shard_bytes)
        folders.append(path)
    recipe = CompressionConfig(ratio=0.5, solver="single-step", device="cpu")
    folders.append(folder / "compressed")
    compress(tiny_model("llama"), folders[-1], recipe, windows=token_windows(4, 16))
    for path in folders:
        if checksums:
            write_checksums(path)
        else:
            (path / CHECKSUMS).unlink(missing_ok=True)
    return [Original(path) for path in folders]


def load_outcome(folder: Path, original: Original) -> str:
    """Say what became of loading a folder: identical, different, refused, crashed or hung."""
    signal.alarm(SLOW_SECONDS)
    try:
        found = _contents(cospadi.load(folder))
    except (CheckpointError, UsageError) as error:
        one_line = str(error).isprintable() and len(str(error)) < MOST_CHARACTERS
        return (
            f"refused: {type(error).__name__}, {_reason(str(error))}" if one_line else f"crashed: {str(error)[:300]!r}"
        )
    except SlowError:
        return "hung"
    except Exception as error:  # what no caller expects is what is looked for
        return f"crashed: {type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.alarm(0)
    return "identical" if _same(found, original.model) else "different"


def inspect_outcome(folder: Path, original: Original, number: int) -> str:
    """Say what became of the command ``inspect``: shown, refused with its exit code, crashed or hung."""
    # Drawing tables takes most of the time, and what is drawn was checked before.
    options = () if number % 8 == 0 else ("--json",)
    signal.alarm(SLOW_SECONDS)
    try:
        result = inspected(folder, options)
    except SlowError:
        return "hung"
    finally:
        signal.alarm(0)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"crashed: {type(result.exception).__name__}: {str(result.exception)[:300]}"
    if result.exit_code == 0:
        # What a report says of errors has no checksum: it is for people, and commands may rewrite it.
        reports = [path / "report.json" for path in (folder, original.folder)]
        same = all(path.is_file() for path in reports) and reports[0].read_bytes() == reports[1].read_bytes()
        if result.stdout.replace(str(folder), "") == original.shown[options].replace(str(original.folder), ""):
            return "shown, the same"
        return "different" if same or not any(path.exists() for path in reports) else "shown, of another report"
    lines = result.stderr.strip().split("\n")
    one_line = len(lines) == 1 and lines[0].startswith("Error: ") and result.exit_code in (1, 2)
    return f"refused: exit code {result.exit_code}" if one_line else f"crashed: {result.output[:300]}"


def inspected(folder: Path, options: tuple[str, ...]) -> Any:
    """Run ``inspect`` on a folder."""
    return CliRunner().invoke(command_line, ["inspect", str(folder), *options])


def _contents(model: Any) -> tuple[dict[str, torch.Tensor], list[Any]]:
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    generation = getattr(model, "generation_config", None)
    return model.state_dict(), [type(model), config, generation and generation.to_dict()]


def _same(found: Any, expected: Any) -> bool:
    tensors, others = expected
    if found[1] != others or found[0].keys() != tensors.keys():
        return False
    return all(
        found[0][name].dtype == tensor.dtype and torch.equal(found[0][name], tensor) for name, tensor in tensors.items()
    )


def _reason(text: str) -> str:
    for words in ("differs from its checksum", "not listed in", "is no checksum", "is missing", "leaves the folder"):
        if words in text:
            return words
    return "other"


def _too_slow(*_: object) -> None:
    raise SlowError


if __name__ == "__main__":
    main()
