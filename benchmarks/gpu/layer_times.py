"""Microseconds of one layer and of its two products, beside the dense product; weights cold, launches queued.

    python benchmarks/gpu/layer_times.py --out FILE.json [--shape 8192,8192 ...] [--tokens 1,8,64]

`cospadi-cli bench` times a single pass over the copies per turn, so that what the host needs to launch it is inside the
figure.  Here a CUDA graph holds a pass over all copies, and many replays are queued between two events.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from cospadi.backends import BACKENDS, Placement
from cospadi.evaluation.speed.random_layers import layer_size
from cospadi.formats import FORMATS, pack_dictionary, unpack_dictionary
from cospadi.reporting import machine, versions

COLD = 3
"""Times the last cache that all copies together must exceed."""


def factors(size, value_dtype, device, seed):
    """Random D and S of the right sizes, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    atoms = torch.randn(size.in_features, size.n_atoms, generator=generator, device=device) / size.in_features**0.5
    rows = torch.rand(size.out_features, size.n_atoms, generator=generator, device=device)
    support = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, rows.topk(size.n_nonzero, dim=1).indices, True)
    values = torch.randn(rows.shape, generator=generator, device=device)
    values = torch.where(values < 0, -0.1, 0.1) + values  # none is zero
    S = (values * support / size.n_nonzero**0.5).T.contiguous()
    return pack_dictionary(atoms, value_dtype), FORMATS.create("bitmask").pack(S, value_dtype)


def clock(calls, device, replays):
    """Median microseconds of a call; calls go through the copies."""
    if device.type != "cuda":
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls) * 1e6, None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    taken = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()  # the GPU is busy while what follows is queued
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) * 1e3 / (replays * len(calls)))
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    for _ in range(40):
        calls[0]()
    queued = (time.perf_counter() - begun) / 40 * 1e6  # of the host, for an eager call
    torch.cuda.synchronize(device)
    return statistics.median(taken), queued


def copy_rate(device):
    """Terabytes per second of a large copy, read and written."""
    big = torch.empty((1 << 29) if device.type == "cuda" else (1 << 20), dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    microseconds, _ = clock([partial(other.copy_, big)], device, 10)
    return 2 * big.numel() / microseconds / 1e6


class Copies:
    """Copies of one layer, dense and factorised: so many that no cache holds them all."""

    def __init__(self, shape, ratio, value_dtype, backend, placement, cache):
        d, n = shape
        self.size = layer_size(shape, ratio, value_dtype)
        count = max(2, -(-COLD * cache // self.size.stored_bytes)) if placement.device.type == "cuda" else 2
        made = [factors(self.size, value_dtype, placement.device, seed) for seed in range(count)]
        self.backend, self.placement = backend, placement
        self.prepared = [
            (backend.prepare_dictionary(D, placement), backend.prepare_coefficients([S], placement)) for D, S in made
        ]
        nothing = FORMATS.create("identity").pack(torch.eye(self.size.n_atoms, device=placement.device), "none")
        self.identity = backend.prepare_coefficients([nothing], placement)
        self.dense = [torch.randn(n, d, device=placement.device, dtype=placement.dtype) for _ in range(count)]
        stored = {"x D": made[0][0].values.nbytes, "z S": sum(t.nbytes for t in made[0][1].tensors.values())}
        self.bytes = {"dense": 2 * d * n, **stored, "whole": sum(stored.values())}
        dictionary, coefficients = made[0]
        self.product = unpack_dictionary(dictionary).float().T @ FORMATS.create("bitmask").unpack(coefficients).float()

    def calls(self, x, z):
        """Calls by contender, one for each copy."""
        multiply = self.backend.multiply
        return {
            "dense": [partial(functional.linear, x, W) for W in self.dense],
            "x D": [partial(multiply, D, self.identity, x, None) for D, _ in self.prepared],
            "z S": [partial(multiply, None, S, z, None) for _, S in self.prepared],
            "whole": [partial(multiply, D, S, x, None) for D, S in self.prepared],
        }

    def measure(self, n_tokens):
        """One row of the result."""
        device, dtype, count = self.placement.device, self.placement.dtype, len(self.dense)
        x = torch.randn(n_tokens, self.size.in_features, device=device, dtype=dtype)
        z = torch.randn(n_tokens, self.size.n_atoms, device=device, dtype=dtype)
        with torch.no_grad():
            calls = self.calls(x, z)
            expected = x.float() @ self.product
            error = float((calls["whole"][0]().float() - expected).norm() / expected.norm())
            replays = max(3, min(100, int(4000 / (count * 40)))) if n_tokens < 512 else 5
            times = {name: clock(each, device, replays) for name, each in calls.items()}
        microseconds = {name: found for name, (found, _) in times.items()}
        return {
            "n_atoms": self.size.n_atoms,
            "n_nonzero": self.size.n_nonzero,
            "n_tokens": n_tokens,
            "copies": count,
            "microseconds": microseconds,
            "bytes": self.bytes,
            "times_dense": microseconds["dense"] / microseconds["whole"],
            "host_microseconds": times["whole"][1],
            "relative_error": error,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shape", action="append")
    parser.add_argument("--tokens", default="1,8,64,128,256,1024")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--value-dtype", action="append")
    parser.add_argument("--seconds", type=float, default=60.0, help="begin nothing new after so many")
    args = parser.parse_args()
    begun = time.perf_counter()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    backend, placement = BACKENDS.create("cuda" if gpu else "reference"), Placement(device, torch.bfloat16)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if gpu else 1 << 20
    rate = copy_rate(device)
    figures = {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "copy_terabytes_per_second": rate,
        "ratio": args.ratio,
        "method": " ".join(__doc__.split("\n\n")[-1].split()),
        "machine": machine(),
        "versions": versions(),
        "rows": [],
    }
    print(f"copy {rate:.2f} TB/s, cache {cache >> 20} MiB, {device}", flush=True)
    names = ("dense", "x D", "z S", "whole")
    print(
        f"{'layer':12s} {'values':9s} {'T':>5s}",
        *(f"{name:>8s}" for name in names),
        " x dense  part of the copy rate",
        flush=True,
    )
    for shape in args.shape or ["8192,8192", "4096,14336", "14336,4096", "4096,4096"]:
        for value_dtype in args.value_dtype or ["bfloat16", "int8"]:
            if time.perf_counter() - begun > args.seconds:
                print(f"{shape} {value_dtype}: no time left", flush=True)
                continue
            d, n = map(int, shape.split(","))
            copies = Copies((d, n), args.ratio, value_dtype, backend, placement, cache)
            for n_tokens in map(int, args.tokens.split(",")):
                row = {"shape": [d, n], "value_dtype": value_dtype, **copies.measure(n_tokens)}
                figures["rows"].append(row)
                took = [row["microseconds"][name] for name in names]
                parts = [f"{row['bytes'][name] / us / 1e6 / rate:5.2f}" for name, us in zip(names, took, strict=True)]
                text = f"{f'{d}x{n}':12s} {value_dtype:9s} {n_tokens:5d} " + " ".join(f"{us:8.1f}" for us in took)
                host = f"host {row['host_microseconds'] or 0:.1f} us, error {row['relative_error']:.1e}"
                print(text, f"{row['times_dense']:8.2f} ", *parts, f"  {host}", flush=True)
                if args.out:
                    args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(1 if any(not row["relative_error"] < 0.02 for row in figures["rows"]) else 0)


if __name__ == "__main__":
    main()
