"""Ray against processes of this machine, over the solving of one model; and a Ray job that loses a worker.

    python benchmarks/distributed.py --cache FOLDER

Calibration and profile are in the cache before anything is timed.  Then ``local`` and ``ray`` solve in turn with the
same recipe, two workers of one thread each.  Last, a cluster of two nodes with two CPUs each has one worker killed
(SIGKILL) a third of the way and gets a third node half-way.  All checkpoints must be the same, byte for byte.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from common import save_result

from cospadi.events import Event, GroupFinished, Planned
from cospadi.models import embedded_model
from cospadi.pipeline import compress
from cospadi.recipe import CompressionConfig, Execution, read_recipe

WORKERS = 2
GOAL = 1.10
RECIPE = {"storage": "factors", "dictionary": "learned", "value_dtype": "bfloat16", "groups": "none", "solver": "htp"}
"""Every layer a task, and every task the same kind of work."""
NODE: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 200 * 2**20, "include_dashboard": False}


PATIENCE = {"health_check_failure_threshold": 100}
"""Several nodes share this machine: one that is slow to answer has not died."""


@dataclass
class Run:
    """What one compression told; moments are seconds of the machine's monotonic clock."""

    planned: float = 0.0
    finished: list[tuple[float, float]] = field(default_factory=list)
    """For each unit when it was done and the seconds that it took in its worker."""
    retried: list[str] = field(default_factory=list)
    n_units: int = 0
    report: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Give the seconds of the solving stage, and of what comes before its first unit begins."""
        begun = min(end - seconds for end, seconds in self.finished)
        return {
            "solving": self.report["stages"]["solving"],
            "before_first_unit": begun - self.planned,
            "after": max(end for end, _ in self.finished) - begun,
            "sum_of_units": sum(seconds for _, seconds in self.finished),
            "units": len(self.finished),
            "all": self.report["seconds"],
            "retried": self.retried,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder; default: the embedded model")
    parser.add_argument("--recipe", type=Path, help="recipe file; default: learned dictionaries, no groups, htp")
    parser.add_argument("--include", action="append", metavar="PATTERN", help="layers to compress; default: all")
    parser.add_argument("--cache", type=Path, required=True, help="folder of statistics and profile; filled if empty")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ray-inputs", choices=["shared", "object-store"], default="shared")
    parser.add_argument("--only", choices=["overhead", "killed"], help="one of the two parts")
    parser.add_argument("--name", default="distributed", help="name of the result file")
    args = parser.parse_args()
    recipe = read_recipe(args.recipe) if args.recipe else dict(RECIPE)
    if args.include:
        recipe["include"] = args.include
    config = CompressionConfig.from_dict(recipe)
    bench = Bench(args.model or embedded_model(), config, args.cache, args.ray_inputs)
    figures: dict[str, Any] = {"model": bench.model.name, "seed": config.seed, "recipe": recipe}
    expected = bench.local().digests  # also fills the cache
    figures["sha256"] = expected
    if args.only != "killed":
        figures["overhead"] = overhead(bench, expected, args.repeats)
        print(json.dumps(figures["overhead"], indent=1), flush=True)
    if args.only != "overhead":
        figures["killed"] = killed(bench, expected)
        print(json.dumps(figures["killed"], indent=1), flush=True)
    print(save_result(args.name, figures))


@dataclass(frozen=True)
class Bench:
    """Compresses one model in a fresh process each time."""

    model: Path
    config: CompressionConfig
    cache: Path
    inputs: str

    def local(self) -> Run:
        return self.run({"executor": "local", "workers": WORKERS, "threads": 1})

    def ray(self, address: str, watch: Callable[[Run], None] | None = None, **more: Any) -> Run:
        where = {"executor": "ray", "ray_address": address, "ray_inputs": self.inputs, "threads": 1}
        return self.run(where | more, watch)

    def run(self, execution: dict[str, Any], watch: Callable[[Run], None] | None = None) -> Run:
        """Compress once; ``watch`` is called again and again while it lasts."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            context = multiprocessing.get_context("spawn")
            mine, theirs = context.Pipe(duplex=False)
            arguments = (theirs, self.model, out, self.config, self.cache, execution)
            child = context.Process(target=compress_and_tell, args=arguments)
            child.start()
            theirs.close()
            run = Run()
            for kind, *values in messages(mine):
                if kind == "planned":
                    run.planned, run.n_units = values
                elif kind == "finished":
                    run.finished.append((values[0], values[1]))
                elif kind == "retried":
                    run.retried.append(values[0])
                if watch is not None:
                    watch(run)
            child.join()
            if child.exitcode != 0:
                raise SystemExit(f"compress with {execution} ended with code {child.exitcode}")
            run.report = json.loads((out / "run.json").read_text(encoding="utf-8"))
            run.digests = {
                str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(out.rglob("*"))
                if path.is_file() and path.name != "run.json"  # holds the times
            }
            return run


def compress_and_tell(
    connection: Connection, model: Path, out: Path, config: CompressionConfig, cache: Path, execution: dict[str, Any]
) -> None:
    def tell(event: Event) -> None:
        if isinstance(event, Planned):
            connection.send(("planned", time.monotonic(), event.n_units))
        elif isinstance(event, GroupFinished):
            connection.send(("finished", time.monotonic(), event.seconds))

    logging.getLogger("cospadi.executors").addHandler(Lost(connection))
    compress(model, out, config, cache=cache, on_event=tell, execution=Execution(**execution))


class Lost(logging.Handler):
    """Passes on what executors say of workers that they lost."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        self.connection.send(("retried", record.getMessage()))


def messages(connection: Connection) -> Iterator[tuple[Any, ...]]:
    """Give what arrives until the other end closes, and something every tenth of a second when nothing does."""
    while True:
        if not connection.poll(0.1):
            yield ("nothing",)
            continue
        try:
            yield connection.recv()
        except EOFError:
            return


@contextmanager
def cluster(n_nodes: int) -> Iterator[Any]:
    """Start a Ray cluster of so many nodes on this machine."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={**NODE, "_system_config": PATIENCE})
    try:
        for _ in range(n_nodes - 1):
            started.add_node(**NODE)
        yield started
    finally:
        started.shutdown()


def overhead(bench: Bench, expected: dict[str, str], repeats: int) -> dict[str, Any]:
    """Time both executors in turn; a Ray that idles while the other is timed would take part of its machine."""
    rows: dict[str, list[dict[str, Any]]] = {"local": [], "ray": []}
    for repeat in range(repeats):
        for executor in ("local", "ray") if repeat % 2 == 0 else ("ray", "local"):
            started = 0.0
            if executor == "local":
                run = bench.local()
            else:
                begin = time.monotonic()
                with cluster(1) as nodes:
                    started = time.monotonic() - begin
                    run = bench.ray(nodes.address, workers=WORKERS)
            row = {"cluster_start": started, **run.figures(), "identical": run.digests == expected}
            row["solving_with_start"] = row["solving"] + started
            print(executor, json.dumps(row), flush=True)
            rows[executor].append(row)
    medians = {
        executor: {key: median(row[key] for row in rows[executor]) for key in TIMES} for executor in ("local", "ray")
    }
    ratios = {key: medians["ray"][key] / medians["local"][key] for key in ("solving", "solving_with_start", "after")}
    return {
        "workers": WORKERS,
        "threads": 1,
        "ray_inputs": bench.inputs,
        "medians": medians,
        "ray_over_local": ratios,
        "goal": GOAL,
        "reached": ratios["solving"] <= GOAL,
        "identical": all(row["identical"] for of_one in rows.values() for row in of_one),
        "rows": rows,
    }


TIMES = ("cluster_start", "before_first_unit", "solving", "solving_with_start", "after", "sum_of_units", "all")


def killed(bench: Bench, expected: dict[str, str]) -> dict[str, Any]:
    """Kill a worker and add a node while the job runs; give what happened."""
    happened: dict[str, Any] = {"killed_after": None, "node_added_after": None, "late_node_worked": False}
    with cluster(2) as nodes:
        first = [raylet(node) for node in nodes.list_all_nodes()]
        late: list[int] = []

        def watch(run: Run) -> None:
            done = len(run.finished)
            if run.n_units and done >= run.n_units / 3 and happened["killed_after"] is None:
                busy = busy_workers(first)
                if busy:  # else at the next look
                    happened["busy_workers"] = len(busy)
                    busy[0].kill()
                    happened["killed_after"] = done
            if run.n_units and done >= run.n_units / 2 and not late:
                late.append(raylet(nodes.add_node(**NODE)))
                happened["node_added_after"] = done
            if late and not happened["late_node_worked"]:
                happened["late_node_worked"] = bool(busy_workers(late))

        run = bench.ray(nodes.address, watch)  # as many workers as the nodes take: four, then six
    return {"nodes": [2, 3], "cpus_per_node": 2, **happened, "identical": run.digests == expected, **run.figures()}


def raylet(node: Any) -> int:
    """Give the process that starts a node's workers."""
    return int(node.all_processes["raylet"][0].process.pid)


NOT_BUSY = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes of a node without a task; a node whose agents die goes down with them."""


def busy_workers(raylets: list[int]) -> list[psutil.Process]:
    """Give the workers of these nodes that have a task: Ray writes what they do into their titles."""
    found = []
    for parent in raylets:
        for process in psutil.Process(parent).children():
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:  # ended meanwhile
                continue
            if title.startswith("ray::") and not title.startswith(NOT_BUSY):
                found.append(process)
    return found


if __name__ == "__main__":
    main()
