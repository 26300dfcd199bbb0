"""Peak memory of solving and profiling one layer, and the factors of the formula that predicts it (Linux).

    python benchmarks/solving_memory.py

Each way of storing is solved for random layers of several shapes, each in a process of its own, whose peak over what it
had before is taken.  For each way the least factors are found that cover every shape: bytes = 8 (a d^2 + b d n + c m^2)
for d inputs, n outputs and m the lesser of them (n where the dictionary is on the side of the outputs).
``cospadi/pipeline/memory_plan.py`` holds them, rounded.
"""

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import save_result
from scipy.optimize import linprog

from cospadi.allocation import Choice, Factors, GroupPlan, Method, Quantized, families_of, profile_group
from cospadi.calibration import SourceStatistics
from cospadi.models import Group, Layer, keep_small_heap, trim_heap
from cospadi.pipeline.approximate import factorize_group
from cospadi.pipeline.group_inputs import GroupInputs
from cospadi.pipeline.memory_plan import solving_terms
from cospadi.recipe import CompressionConfig
from cospadi.solvers import SOLVERS

SHAPES = ((1024, 1024), (1024, 3072), (3072, 1024), (2048, 1536), (768, 4224))
WAYS = ("single-step", "htp", "output", "whole-numbers", "sparse", "quantized", "profile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="solving-memory", help="name of the result file")
    args = parser.parse_args()
    rows = []
    for way in WAYS:
        own = [row(way, d, n, args.threads) for d, n in SHAPES]
        rows.append({"way": way, "factors": covering(way, own), "rows": own})
        print(json.dumps(rows[-1]), flush=True)
    print(save_result(args.name, {"seed": 0, "threads": args.threads, "ways": rows}))


def row(way: str, d: int, n: int, threads: int) -> dict[str, Any]:
    """Measure in a fresh process, which has freed nothing yet that could be used again."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak, seconds = pool.apply(measure, (way, d, n, threads))
    return {"in_features": d, "out_features": n, "bytes": peak, "seconds": seconds}


def measure(way: str, d: int, n: int, threads: int) -> tuple[int, float]:
    """Give the bytes that a layer's inputs and its solution take at most, and the seconds."""
    keep_small_heap()
    torch.set_num_threads(threads)
    work(way, *inputs(64, 64))  # loads whatever libraries load when they are first used
    trim_heap()
    before = memory("VmRSS")
    given = inputs(d, n)
    trim_heap()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = time.perf_counter()
    work(way, *given)
    return memory("VmHWM") - before, time.perf_counter() - start


def inputs(d: int, n: int) -> tuple[Group, GroupInputs]:
    """Make a layer whose inputs decay, with a Gram of full rank."""
    generator = torch.Generator().manual_seed(0)
    layer = Layer("layer", 0, "layer", "layer", d, n, False)
    known = SourceStatistics("layer", d, {"layer": n})
    assert known.gram is not None
    x = torch.randn(d + 64, d, generator=generator) * torch.linspace(1, 0.05, d)
    known.gram.add(x)
    known.n_tokens = known.layers["layer"].n_tokens = len(x)
    known.layers["layer"].squares += torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    weight = 0.02 * torch.randn(n, d, generator=generator).T
    return Group((layer,)), GroupInputs({"layer": weight}, {}, {"layer": known})


def work(way: str, group: Group, given: GroupInputs) -> None:
    """Do what a run does with one layer."""
    config = CompressionConfig()
    target = given.objective(config, group, weighted=True)
    method = Method(way, SOLVERS.create(*SOLVER.get(way, SOLVER["htp"])), "bitmask", 0)
    if way == "profile":
        profile_group(target, "layer", families_of(config, method), spectrum=False)
        return
    d, n = group.in_features, group.layers[0].out_features
    gram = given.statistics["layer"].gram
    assert gram is not None
    factorize_group(GroupPlan(group, choice(way, d, n), None), target, {"layer": gram.matrix}, {}, method)


SOLVER: dict[str, tuple[str, dict[str, Any]]] = {"single-step": ("single-step", {}), "htp": ("htp", {"n_iter": 2})}
"""More iterations take the same memory."""


def choice(way: str, d: int, n: int) -> Choice:
    k = round(0.8 * min(d, n))
    if way == "quantized":
        return Quantized(("int4g64",))
    if way == "sparse":
        return Factors(d, round(0.6 * d), dictionary_dtype="none")
    if way == "output":
        return Factors(k, k // 2, "output")
    if way == "whole-numbers":
        return Factors(k, k // 2, value_dtype="int8", dictionary_dtype="int8")
    return Factors(k, k // 2)


def covering(way: str, rows: list[dict[str, Any]]) -> list[float]:
    """Give the least factors, none negative, with which the formula gives no shape less than was measured."""
    terms = np.array([solving_terms(way, r["in_features"], r["out_features"]) for r in rows])
    shares = 8 * terms / np.array([r["bytes"] for r in rows])[:, None]
    found = linprog(shares.sum(axis=0), A_ub=-shares, b_ub=-np.ones(len(rows)))
    return [float(factor) for factor in found.x]


def memory(key: str) -> int:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(key))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
