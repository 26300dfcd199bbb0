"""The kernels of the CUDA backend on the CPU, with the interface of a module on a GPU.

``build`` compiles the very source that NVRTC compiles, after the emulator's header, into a library and, with the
address and undefined-behaviour sanitizers, into a program.
"""

import ctypes
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
ORDERS = ("forward", "reverse", "random")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DPROGRAM", "-g1", "-O0")


class Fault(Exception):
    """The emulator or a sanitizer found a fault in a kernel."""


def build(folder: Path) -> tuple[Path, Path]:
    """Compile library and program."""
    library, program = folder / "kernels.so", folder / "kernels"
    running = [
        subprocess.Popen(_command(library, ("-shared", "-fPIC", "-O1")), stderr=subprocess.PIPE, text=True),
        subprocess.Popen(_command(program, SANITIZERS), stderr=subprocess.PIPE, text=True),
    ]
    for process in running:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    return library, program


def _command(output: Path, options: tuple[str, ...]) -> list[str]:
    kernels = resources.files("cospadi.backends.cuda").joinpath("kernels.cu")
    # Checked versions of longjmp refuse to change stacks.
    common = ["-std=c++17", "-U_FORTIFY_SOURCE", f'-DKERNELS_FILE="{kernels}"']
    return [str(COMPILER), *common, *options, "-o", str(output), str(HERE / "host.cpp")]


@dataclass
class EmulatedModule:
    """The kernels in a library, run in this process, or in the program with the sanitizers.

    Parameters
    ----------
    path : Path
        Library or program.
    order : str
        In which threads, warps and blocks run; see ``ORDERS``.
    seed : int
        Of the random order.

    Attributes
    ----------
    launched : list of (str, tuple)
        Names and arguments, in order.
    """

    path: Path
    order: str = "forward"
    seed: int = 0
    launched: list[tuple[str, tuple]] = field(default_factory=list)

    def kernel(self, name: str) -> "EmulatedKernel":
        """Give a kernel."""
        return EmulatedKernel(self, name)


@dataclass
class EmulatedKernel:
    """A kernel by its name."""

    module: EmulatedModule
    name: str

    def launch(self, grid, block, shared_bytes, args):
        """Run the kernel.

        Raises
        ------
        Fault
            The emulator or a sanitizer found one.
        """
        module = self.module
        module.launched.append((self.name, args))
        sizes = (*grid, *block, shared_bytes, ORDERS.index(module.order), module.seed)
        assert all(arg.device.type == "cpu" and arg.is_contiguous() for arg in args if isinstance(arg, Tensor))
        run = _in_library if module.path.suffix == ".so" else _in_program
        fault = run(module.path, self.name, sizes, args)
        if fault:
            raise Fault(fault)


def _in_library(path, name, sizes, args):
    function = ctypes.CDLL(str(path)).emulate
    function.restype = ctypes.c_char_p
    values = [
        ctypes.c_int(arg) if isinstance(arg, int) else ctypes.c_void_p(None if arg is None else arg.data_ptr())
        for arg in args
    ]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    return function(name.encode(), (ctypes.c_uint * len(sizes))(*sizes), pointers).decode()


def _in_program(path, name, sizes, args):
    request, reply = path.with_suffix(".in"), path.with_suffix(".out")
    content = struct.pack("64s9II", name.encode(), *sizes, len(args))
    for arg in args:
        data = _bytes(arg) if isinstance(arg, Tensor) else struct.pack("q", arg or 0)
        content += struct.pack("QQ", len(data), isinstance(arg, Tensor)) + data
    request.write_bytes(content)
    done = subprocess.run([str(path), str(request), str(reply)], capture_output=True, text=True)
    if done.returncode:
        return done.stderr or f"exit code {done.returncode}"
    changed = memoryview(bytearray(reply.read_bytes()))
    for arg in (arg for arg in args if isinstance(arg, Tensor) and arg.numel()):
        size = arg.numel() * arg.element_size()
        arg.view(-1).view(torch.uint8).copy_(torch.frombuffer(changed[:size], dtype=torch.uint8))
        changed = changed[size:]
    return ""


def _bytes(tensor: Tensor) -> bytes:
    return tensor.view(-1).view(torch.uint8).numpy().tobytes()
