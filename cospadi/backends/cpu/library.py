"""The kernels of kernels.c as a library: compiled by the C compiler of the machine on first use, then cached."""

import ctypes
import functools
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

from cospadi.backends import kernel_cache as cache
from cospadi.errors import CospadiError, UnavailableError

LEVELS = {
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi2 -mavx512bf16 -mavx512vnni -mfma -mpopcnt "
    "-DWITH_AVX512",
    "avx2": "-mavx2 -mfma -mf16c -mpopcnt -DWITH_AVX2",
    "neon": "-DWITH_NEON",
    "portable": "",
}
"""Instruction sets, best first, with the compiler's flags for each."""

_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fno-math-errno")
_OF_MACHINE = {"x86_64": ("avx512", "avx2"), "amd64": ("avx512", "avx2"), "aarch64": ("neon",), "arm64": ("neon",)}

logger = logging.getLogger(__name__)


class Dictionary(ctypes.Structure):
    """``struct dictionary`` of kernels.c."""

    _fields_ = [
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("n_atoms", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("kind", ctypes.c_int64),
    ]


class Coefficients(ctypes.Structure):
    """``struct coefficients`` of kernels.c."""

    _fields_ = [
        ("mask", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("tail_mask", ctypes.c_void_p),
        ("tail_values", ctypes.c_void_p),
        ("tail", ctypes.c_int64),
        ("n_atoms", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("kind", ctypes.c_int64),
    ]


@functools.lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """Give the compiled kernels of every instruction set that the compiler knows.

    Raises
    ------
    UnavailableError
        There is no C compiler.
    CospadiError
        It does not compile the kernels.
    """
    own = [file for file in files(__package__).iterdir() if file.name.endswith((".c", ".h"))]
    sources = {file.name: file.read_bytes() for file in own}
    compiler = _compiler()
    levels = (*_OF_MACHINE.get(platform.machine().lower(), ()), "portable")
    told = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    texts = [sources[name].decode() for name in sorted(sources)]
    key = cache.key_of(*texts, *(LEVELS[level] for level in levels), *_FLAGS, *compiler, told, platform.machine())
    library = cache.read(key)
    if library is None:
        library = _compile(sources, compiler, levels)
        cache.write(key, library)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "cospadi_kernels.so"
        file.write_bytes(library)
        loaded = ctypes.CDLL(str(file))
    loaded.use_openmp(*_runtime())
    return loaded


def levels() -> list[str]:
    """Name the instruction sets that were compiled and that this processor has, best first."""
    library = load()
    return [name for name in LEVELS if hasattr(library, f"multiply_{name}") and library[f"supported_{name}"]()]


def _runtime() -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """Find the OpenMP runtime that torch has loaded: addresses of ``GOMP_parallel`` and ``GOMP_barrier``."""
    process = ctypes.CDLL(None)
    try:
        return ctypes.cast(process.GOMP_parallel, ctypes.c_void_p), ctypes.cast(process.GOMP_barrier, ctypes.c_void_p)
    except AttributeError:
        logger.warning("torch's OpenMP runtime has no GOMP_parallel here: the cpu backend runs on one thread")
        return ctypes.c_void_p(), ctypes.c_void_p()


def _compiler() -> list[str]:
    if sys.byteorder != "little" or sys.platform == "win32":
        raise UnavailableError("the kernels of backend 'cpu' are made for little-endian Linux and macOS machines")
    named = os.environ.get("CC")
    for words in [shlex.split(named)] if named else [["cc"], ["gcc"], ["clang"]]:
        if words and shutil.which(words[0]):
            return words
    where = f"the compiler named in CC ({named}) is not found" if named else "no C compiler is found (cc, gcc or clang)"
    raise UnavailableError(f"{where}: install one (for example: apt install gcc), or choose backend 'torch'")


def _compile(sources: dict[str, bytes], compiler: list[str], levels: tuple[str, ...]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in sources.items():
            (Path(folder) / name).write_bytes(text)
        jobs = {level: [*LEVELS[level].split(), f"-DLEVEL={level}", "-c", "kernels.c"] for level in levels}
        jobs["processor"] = ["-c", "processor.c"]

        def one(name: str) -> str | None:
            made = _run([*compiler, *_FLAGS, *jobs[name], "-o", f"{name}.o"], folder)
            if made.returncode and name in ("portable", "processor"):
                raise CospadiError(f"{compiler[0]} cannot compile the kernels of backend 'cpu': {_first(made.stderr)}")
            if made.returncode:
                logger.warning("%s does not compile kernels for %s: %s", compiler[0], name, _first(made.stderr))
                return None
            return f"{name}.o"

        with ThreadPoolExecutor() as pool:
            objects = [name for name in pool.map(one, jobs) if name]
        made = _run([*compiler, "-shared", "-o", "kernels.so", *objects], folder)
        if made.returncode:
            raise CospadiError(f"{compiler[0]} does not link the kernels of backend 'cpu': {_first(made.stderr)}")
        return (Path(folder) / "kernels.so").read_bytes()


def _run(command: list[str], folder: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _first(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no message"
