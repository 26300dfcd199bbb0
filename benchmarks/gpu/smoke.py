"""The fastest checks of each part that only a GPU runs, before anything slower is tried.

Prints one line per check and continues after a failure; exit code 1 if one failed.
"""

import argparse
import time
import traceback
from importlib import resources

import torch

from cospadi.backends import BACKENDS, Placement
from cospadi.backends.cuda import nvrtc
from cospadi.backends.cuda.runtime import machine_of
from cospadi.backends.selftest.examples import example as make
from cospadi.backends.selftest.learners import ksvd
from cospadi.backends.selftest.products import prepared
from cospadi.evaluation.speed.dispatch_overhead import sparse_linear
from cospadi.evaluation.speed.random_layers import layer_size, random_layer
from cospadi.solvers import SOLVERS, Problem, relative_error

FAILED = []


def check(name):
    def run(function):
        start = time.perf_counter()
        try:
            text = function() or ""
            verdict = "ok    "
        except Exception as error:  # one finding; the next check still runs
            text, verdict = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "FAILED"
            FAILED.append(name)
            traceback.print_exc()
        print(f"{verdict} {name:34s} {time.perf_counter() - start:7.2f} s  {text}", flush=True)

    return run


def example(dtype, value_dtype, device, shape=(1000, 1500, (777,))):
    one = make(shape, 0.5, value_dtype, device)
    backend = BACKENDS.create("cuda")
    return one, backend, Placement(device, dtype), prepared(backend, one, Placement(device, dtype))


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")

    @check("NVRTC: found, version, compiles")
    def _():
        capability = torch.cuda.get_device_capability() if gpu else (9, 0)
        architecture = nvrtc.architecture_for(capability)
        source = resources.files("cospadi.backends.cuda").joinpath("kernels.cu").read_text(encoding="utf-8")
        start = time.perf_counter()
        compiled = nvrtc.compile_afresh(source, architecture, ("-std=c++17",))
        took = time.perf_counter() - start
        return f"{nvrtc.version()}, {architecture}, {len(compiled.cubin) // 1024} KiB in {took:.1f} s"

    if not gpu:
        print("no GPU: the other checks are left out", flush=True)
        raise SystemExit(1 if FAILED else 0)

    @check("driver API: module, context, limits")
    def _():
        machine = machine_of(device)
        return f"{type(machine.module).__name__}, {machine.n_processors} multiprocessors"

    for dtype, value_dtype in (
        (torch.bfloat16, "bfloat16"),
        (torch.bfloat16, "int8"),
        (torch.float16, "float16"),
        (torch.float16, "int8"),
    ):

        @check(f"kernels, {str(dtype)[6:]} x, {value_dtype} factors")
        def _(dtype=dtype, value_dtype=value_dtype):
            one, backend, placement, (dictionary, coefficients) = example(dtype, value_dtype, device)
            worst = 0.0
            for n_tokens in (1, 8, 9, 16, 17, 32, 33, 64, 65, 256, 257, 1024):
                x = one.inputs(n_tokens, placement)
                y = backend.multiply(dictionary, coefficients, x, None)
                expected = x.double() @ one.weight(None)
                error = float((y.double() - expected).norm() / expected.norm())
                assert error < (1e-2 if dtype == torch.bfloat16 else 1.25e-3), (n_tokens, error)
                worst = max(worst, error)
            return f"worst relative error {worst:.2e}"

    @check("CUDA graph, side stream branch")
    def _():
        one, backend, placement, (dictionary, coefficients) = example(torch.bfloat16, "bfloat16", device)
        for n_tokens in (1, 513):
            x = one.inputs(n_tokens, placement)
            for _ in range(2):
                expected = backend.multiply(dictionary, coefficients, x, None)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = backend.multiply(dictionary, coefficients, x, None)
            y.fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, expected), n_tokens

    @check("torch.compile of one layer")
    def _():
        layer = random_layer(layer_size((512, 512), 0.3), torch.bfloat16, device)
        with torch.no_grad():
            module = sparse_linear(layer, "cuda", device)
            x = torch.randn(3, 512, device=device, dtype=torch.bfloat16)
            expected = module(x)
            found = torch.compile(module, fullgraph=True)(x)
        assert torch.equal(found, expected)

    @check("cupy CSR backend")
    def _():
        one, backend = make((130, 200, (72, 17, 40)), 0.5, "bfloat16", device), BACKENDS.create("cupy")
        for dtype in (torch.bfloat16, torch.float32):
            placement = Placement(device, dtype)
            dictionary, coefficients = prepared(backend, one, placement)
            x = one.inputs(9, placement)
            y, expected = backend.multiply(dictionary, coefficients, x, None), x.double() @ one.weight(None)
            error = float((y.double() - expected).norm() / expected.norm())
            assert error < 1e-2, (dtype, error)

    for name in ("ksvd-torch", "ksvd-cupy"):

        @check(f"{name} on the GPU beside numpy")
        def _(name=name):
            found = ksvd(name, device)
            assert found.verdict == "passed", found
            return f"worst {found.worst}"

    for name in ("htp", "admm", "mod", "orthogonal", "single-step", "svd"):

        @check(f"{name} on the GPU beside the CPU")
        def _(name=name):
            generator = torch.Generator().manual_seed(0)
            target = torch.randn(96, 200, generator=generator) * torch.arange(1.0, 97.0)[:, None] ** -0.6
            n_atoms, n_nonzero = (48, 24) if SOLVERS.get(name).sparse else (40, 40)
            errors = []
            for where in (device, torch.device("cpu")):
                solution = SOLVERS.create(name).solve(Problem(target.to(where), n_atoms, n_nonzero))
                assert solution.dictionary.device == where
                errors.append(relative_error(target.to(where), solution))
            assert errors[0] <= 1.02 * errors[1] + 1e-6, errors
            return f"errors {errors[0]:.5f} (GPU) {errors[1]:.5f} (CPU)"

    raise SystemExit(1 if FAILED else 0)


if __name__ == "__main__":
    main()
