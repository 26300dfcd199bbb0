"""Kill compressions of a small model at random moments, resume them, and compare with an uninterrupted run.

    python benchmarks/kills.py --runs 100 --seed 0

Each run is killed (SIGKILL to its process group) at a moment drawn uniformly from the time that a run takes, one in
four is killed again while it resumes, and then it is resumed to its end.  Every file but run.json must be that of an
uninterrupted run, and no record may be made twice but that of the unit in progress.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import save_result
from synthetic import llama_config, write_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cospadi.events import Event, GroupFinished, Progress
from cospadi.pipeline import WORK, compress
from cospadi.recipe import CompressionConfig, Execution

RECIPE: dict[str, Any] = {"ratio": 0.3, "storage": "factors", "solver": "htp", "solver_options": {"n_iter": 40}}
CALIBRATION = {"samples": 16, "seq_len": 128, "batch_size": 2}
ORDERS: dict[str, dict[str, Any]] = {"one-shot": {}, "sequential": {"order": "sequential"}}
EXECUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"threads": 1},
    "limited": {"max_memory": 2 << 30, "threads": 1},
    "workers": {"workers": 2, "threads": 1},
    "limited-workers": {"max_memory": 2 << 30, "workers": 2, "threads": 1},
}
SECOND_KILL = 0.25
PRELOADED = ["cospadi.pipeline.stages", "cospadi.recipe.resources", "transformers.models.llama.modeling_llama"]


@dataclass
class Attempt:
    """What one process of a run did, from the log that it kept.

    Attributes
    ----------
    killed : bool
        It was still at work when its moment came.
    code : int or None
        Exit code; None for one that had to be stopped because it did not end.
    stage : str
        Where it was, by the last event.
    finished : set of str
        Groups that it factorised itself.
    records : set of str
        Files of the work folder that it was about to put in place, without their suffix: the parts of one record
        differ in it alone.  Notes, which every run writes anew, are none.
    error : str
        The last line of its standard error.
    """

    killed: bool
    code: int | None
    stage: str = "opening"
    finished: set[str] = field(default_factory=set)
    records: set[str] = field(default_factory=set)
    error: str = ""


def main() -> None:
    variants = [f"{order}:{execution}" for order in ORDERS for execution in EXECUTIONS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="killed runs over all variants together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", action="append", choices=variants, help="taken in turn; default: all. Repeatable.")
    parser.add_argument("--scratch", type=Path, help="keeps the folders of runs that failed; default: temporary")
    parser.add_argument("--name", default="kills", help="name of the result file")
    args = parser.parse_args()
    chosen = args.variant or variants
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        model = scratch / "model"
        if not model.exists():
            write_model(model, llama_config(4, 64, 176, 4, 2, 259), byte_tokenizer(), 10**9, args.seed)
        by_variant = {variant: Bench(variant, model, scratch) for variant in chosen}
        benches = list(by_variant.values())
        for bench in benches:
            bench.prepare()
            print(f"{bench.variant}: {bench.seconds:.2f} s", flush=True)
        for index in range(args.runs):
            bench = by_variant[chosen[index % len(chosen)]]
            row = bench.killed_run(index, np.random.default_rng([args.seed, index]))
            print(json.dumps(row), flush=True)
    figures = {"seed": args.seed, "recipe": RECIPE, "calibration": CALIBRATION, **totals(benches)}
    print(save_result(args.name, figures))
    if figures["failures"]:
        raise SystemExit(f"{len(figures['failures'])} runs failed")


class Bench:
    """One variant: its uninterrupted run, and runs that are killed.

    Parameters
    ----------
    variant : str
        ORDER:EXECUTION.
    model, scratch : Path
        The dense model, and where the results go.
    """

    def __init__(self, variant: str, model: Path, scratch: Path) -> None:
        self.variant, self.model = variant, model
        order, execution = variant.split(":")
        self.config = CompressionConfig.from_dict(RECIPE | {"calibration": CALIBRATION | ORDERS[order]})
        self.execution = EXECUTIONS[execution]
        self.scratch = scratch / variant.replace(":", "-")
        self.scratch.mkdir(exist_ok=True)
        # A server that has imported everything forks a child for each run: children start fast, and share no state.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.expected: dict[str, str] = {}
        self.seconds = 0.0
        self.n_records = 0
        self.rows: list[dict[str, Any]] = []

    def prepare(self) -> None:
        """Run twice without a kill: the results must be the same, and the second run's time counts."""
        found = []
        for name in ("first", "second"):
            begin = time.perf_counter()
            attempt = self.attempt(self.scratch / name, None)
            self.seconds = time.perf_counter() - begin
            if attempt.code != 0:
                raise SystemExit(f"{self.variant}: an uninterrupted run failed: {attempt.error}")
            found.append(digests(self.scratch / name))
            self.n_records = len(attempt.records)
            shutil.rmtree(self.scratch / name)
        if found[0] != found[1]:
            raise SystemExit(f"{self.variant}: two uninterrupted runs differ in {differences(*found)}")
        self.expected = found[0]

    def killed_run(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Kill, resume and compare; give what happened."""
        out, missed = self.scratch / f"run-{index}", 0
        while True:
            first = rng.uniform(0, self.seconds)
            attempts = [self.attempt(out, first)]
            if attempts[0].killed:
                break
            missed += 1  # this run was faster: try another moment
            shutil.rmtree(out)
        if rng.random() < SECOND_KILL:
            attempts.append(self.attempt(out, rng.uniform(0, self.seconds)))
        if complete := digests(out) == self.expected:
            attempts[-1].stage = "complete"  # nothing is left to resume, and --resume may say so by its exit code
        elif attempts[-1].killed:
            attempts.append(self.attempt(out, None))
        row = {
            "run": index,
            "variant": self.variant,
            "kills": [attempt.stage for attempt in attempts if attempt.killed],
            "first_after": first / self.seconds,
            "missed": missed,
            **redone(attempts),
            "failure": "" if complete else self.failure(out, attempts[-1]),
        }
        self.rows.append(row)
        if not row["failure"]:
            shutil.rmtree(out)
        return row

    def failure(self, out: Path, last: Attempt) -> str:
        """Say what is wrong with the end of a run; nothing if it is right."""
        if last.code is None:
            return f"the resumption did not end ({last.stage})"
        if last.code != 0:
            return f"the resumption ended with code {last.code}: {last.error}"
        wrong = differences(digests(out), self.expected)
        return f"other bytes: {', '.join(wrong)}" if wrong else ""

    def account(self) -> dict[str, Any]:
        """Sum up this variant."""
        return {
            "variant": self.variant,
            "seconds": self.seconds,
            "records": self.n_records,
            **counts(self.rows),
        }

    def attempt(self, out: Path, moment: float | None) -> Attempt:
        """Start the compression, or go on with it; kill it after so many seconds, if it still runs."""
        log = out.with_suffix(".log")
        log.unlink(missing_ok=True)
        arguments = (self.model, out, self.config, self.execution, log)
        child = self.context.Process(target=compress_logged, args=arguments)
        begin = time.perf_counter()
        child.start()
        child.join(120 + 20 * self.seconds if moment is None else max(0.0, begin + moment - time.perf_counter()))
        alive = child.exitcode is None
        if alive:
            assert child.pid is not None  # it was started
            kill_group(child.pid)
            child.join()
        attempt = Attempt(alive and moment is not None, None if alive else child.exitcode)
        if not attempt.killed and child.exitcode != 0:
            attempt.error = (log.with_suffix(".err").read_text().strip().splitlines() or [""])[-1]
        read_log(log, attempt)
        return attempt


def compress_logged(model: Path, out: Path, config: CompressionConfig, execution: dict[str, Any], log: Path) -> None:
    """Compress with --resume in a process group of its own, and note durably whatever happens."""
    os.setsid()
    errors = os.open(log.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, sys.stderr.fileno())
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(entry: dict[str, Any]) -> None:
        os.write(file, json.dumps(entry).encode() + b"\n")
        os.fsync(file)

    def tell(event: Event) -> None:
        entry = {"stage": stage_of(event)}
        if isinstance(event, GroupFinished) and not event.resumed:
            entry["finished"] = event.row["name"]
        note(entry)

    def rename(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "os.rename":
            return
        target = Path(os.fspath(arguments[1]))
        if out / WORK in target.parents and not target.name.startswith("note-"):
            note({"record": str(target.relative_to(out / WORK).with_suffix(""))})

    # Noted just before the file gets its name: a kill between the two counts the unit in progress, and misses none.
    sys.addaudithook(rename)
    compress(model, out, config, resume=True, on_event=tell, execution=Execution(**execution))


def stage_of(event: Event) -> str:
    """Name what a run does after an event."""
    if isinstance(event, Progress):
        return event.stage if event.done < event.total else f"after {event.stage}"
    return f"after {event.event}"


def kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # killed before it had a group of its own
        os.kill(pid, signal.SIGKILL)


def read_log(log: Path, attempt: Attempt) -> None:
    """Add what the log tells; its last line may be cut off."""
    for line in log.read_bytes().splitlines(keepends=True) if log.exists() else ():
        if not line.endswith(b"\n"):
            return
        entry = json.loads(line)
        attempt.stage = entry.get("stage", attempt.stage)
        if "finished" in entry:
            attempt.finished.add(entry["finished"])
        if "record" in entry:
            attempt.records.add(entry["record"])


def redone(attempts: list[Attempt]) -> dict[str, Any]:
    """Give what was made again, for each resumption."""
    groups, records = [], []
    for index in range(1, len(attempts)):
        groups.append(sorted(attempts[index].finished & set().union(*(a.finished for a in attempts[:index]))))
        records.append(sorted(attempts[index].records & set().union(*(a.records for a in attempts[:index]))))
    return {"groups_again": groups, "records_again": records}


def counts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum runs up."""
    groups = [len(names) for row in rows for names in row["groups_again"]]
    records = [len(names) for row in rows for names in row["records_again"]]
    return {
        "runs": len(rows),
        "kills": sum(len(row["kills"]) for row in rows),
        "identical": sum(not row["failure"] for row in rows),
        "stages": dict(Counter(stage for row in rows for stage in row["kills"]).most_common()),
        "groups_again_max": max(groups, default=0),
        "records_again_max": max(records, default=0),
        "records_again_mean": sum(records) / len(records) if records else 0.0,
    }


def totals(benches: list[Bench]) -> dict[str, Any]:
    """Sum all up; a resumption that made more than one record again is a failure, too."""
    rows = [row for bench in benches for row in bench.rows]
    orders: dict[str, set[str]] = {}
    for bench in benches:
        orders.setdefault(bench.variant.split(":")[0], set()).add(json.dumps(bench.expected))
    return {
        **counts(rows),
        # The bytes depend on the recipe and on nothing that says where it runs.
        "executions_agree": {order: len(found) == 1 for order, found in orders.items()},
        "variants": [bench.account() for bench in benches],
        "failures": [row for row in rows if row["failure"] or max(map(len, row["records_again"]), default=0) > 1],
    }


def digests(folder: Path) -> dict[str, str]:
    """Give the SHA-256 of every file but run.json, which holds the times."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.json"
    }


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2}
    vocabulary |= {letter: 3 + index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=4096, **ends)


if __name__ == "__main__":
    main()
