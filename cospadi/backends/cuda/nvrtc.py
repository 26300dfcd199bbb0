"""Compilation of CUDA C++ by NVRTC, the compiler library that CUDA builds of torch install; nvcc is not needed."""

import ctypes
import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cospadi.backends import kernel_cache as cache
from cospadi.errors import CospadiError, UnavailableError
from cospadi.registry import Availability

INSTALL = "pip install nvidia-cuda-nvrtc"

_MAJORS = (13, 12)
_LOG_LINES = 12
"""Lines of the compiler's log that an error message shows; later errors mostly follow from the first ones."""

logger = logging.getLogger(__name__)


class KernelError(CospadiError, RuntimeError):
    """A GPU kernel could not be compiled, loaded or started."""


@dataclass(frozen=True)
class Compiled:
    """A program for one architecture.

    Attributes
    ----------
    cubin : bytes
        ELF file for ``cuModuleLoadData``.
    log : str
        Output of the compiler; empty for a program that was taken from the cache.
    """

    cubin: bytes
    log: str


def availability() -> Availability:
    """Tell whether NVRTC can be loaded."""
    try:
        _library()
    except UnavailableError as error:
        return Availability(False, str(error))
    return Availability(True)


def version() -> tuple[int, int]:
    """Give NVRTC's version, such as (13, 0).

    Raises
    ------
    UnavailableError
        There is no NVRTC.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "asking for the version")
    return major.value, minor.value


def architectures() -> tuple[int, ...]:
    """Give the architectures that this NVRTC compiles for, ascending: 90 for ``sm_90``.

    Raises
    ------
    UnavailableError
        There is no NVRTC.
    """
    count = ctypes.c_int()
    library = _library()
    _check(library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "asking for the architectures")
    found = (ctypes.c_int * count.value)()
    _check(library.nvrtcGetSupportedArchs(found), "asking for the architectures")
    return tuple(sorted(found))


def architecture_for(capability: tuple[int, int]) -> str:
    """Give the newest architecture that a GPU of this compute capability runs and that this NVRTC knows.

    Machine code runs on GPUs of the same major and of an equal or higher minor capability.

    Raises
    ------
    UnavailableError
        There is no NVRTC, or it is older than the GPU.
    """
    major, minor = capability
    fitting = [known for known in architectures() if known // 10 == major and known % 10 <= minor]
    if not fitting:
        raise UnavailableError(
            f"NVRTC {_dotted()} does not compile for GPUs of compute capability {major}.{minor} "
            f"(it knows {', '.join(f'{known // 10}.{known % 10}' for known in architectures())}): {INSTALL} of another "
            "version, or choose backend 'torch'"
        )
    return f"sm_{fitting[-1]}"


def compile_cubin(source: str, architecture: str, options: tuple[str, ...] = ()) -> Compiled:
    """Compile a program, or take it from the cache on disk.

    Parameters
    ----------
    source : str
        CUDA C++ that includes no file.
    architecture : str
        Such as ``"sm_90"``.
    options : tuple of str
        Further options of NVRTC, such as ``"-std=c++17"``.

    Raises
    ------
    UnavailableError
        There is no NVRTC.
    KernelError
        The program does not compile; with the first lines of the log.
    """
    key = cache.key_of(source, *options, architecture, _dotted())
    cubin = cache.read(key)
    if cubin is not None:
        return Compiled(cubin, "")
    compiled = compile_afresh(source, architecture, options)
    cache.write(key, compiled.cubin)
    return compiled


def compile_afresh(source: str, architecture: str, options: tuple[str, ...] = ()) -> Compiled:
    """Compile without the cache; see ``compile_cubin``."""
    library = _library()
    program = ctypes.c_void_p()
    made = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    _check(made, "taking the source")
    try:
        given = [f"--gpu-architecture={architecture}", *options]
        texts = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
        code = library.nvrtcCompileProgram(program, len(given), texts)
        # The error message needs the log, so it is fetched first.
        log = _fetch(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
        _check(code, f"compiling for {architecture}", log)
        if log.strip():
            logger.debug("NVRTC, %s:\n%s", architecture, log)
        return Compiled(_fetch(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN"), log)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(program: ctypes.c_void_p, size_of: str, content_of: str) -> bytes:
    library = _library()
    size = ctypes.c_size_t()
    _check(getattr(library, size_of)(program, ctypes.byref(size)), size_of)
    content = ctypes.create_string_buffer(size.value)
    _check(getattr(library, content_of)(program, content), content_of)
    return content.raw


def _check(code: int, doing: str, log: str = "") -> None:
    """Raise for a result other than success."""
    if code != 0:
        lines = [line for line in log.splitlines() if line.strip()]
        shown = "".join(f"\n{line}" for line in lines[:_LOG_LINES])
        more = f"\n... and {len(lines) - _LOG_LINES} more lines" if len(lines) > _LOG_LINES else ""
        raise KernelError(f"NVRTC {doing}: {_library().nvrtcGetErrorString(code).decode()}{shown}{more}")


def _dotted() -> str:
    return ".".join(map(str, version()))


@functools.cache
def _library() -> Any:
    """Load NVRTC.

    Raises
    ------
    UnavailableError
        It is not found.
    """
    for file in _candidates():
        try:
            library = _load(file)
        except OSError as error:
            logger.debug("%s: %s", file, error)
            continue
        _declare(library)
        logger.debug("NVRTC is %s", file)
        return library
    raise UnavailableError(f"NVRTC, which compiles the GPU kernels, is not installed: {INSTALL}")


def _candidates() -> Iterator[Path | str]:
    """Give the files that may be NVRTC: in packages of pip, in a CUDA toolkit, then by name for the system's loader."""
    for major in _wanted_majors():
        name = f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}"
        for folder in _folders(major):
            if (folder / name).is_file():
                yield folder / name
        yield name


def _wanted_majors() -> list[int]:
    """Give the major versions to try: that of torch first, since the driver is at least new enough for it."""
    own = (torch.version.cuda or "").partition(".")[0]
    return sorted(_MAJORS, key=lambda major: str(major) != own)


def _folders(major: int) -> Iterator[Path]:
    nvidia = importlib.util.find_spec("nvidia")
    for root in (nvidia.submodule_search_locations or ()) if nvidia is not None else ():
        # From CUDA 13 on the wheels share one folder; before, each library had its own.
        package = Path(root) / (f"cu{major}" if major >= 13 else "cuda_nvrtc")
        yield from (package / "lib", package / "bin" / "x86_64", package / "bin")
    yield Path(torch.__file__).parent / "lib"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield from (Path(os.environ[variable]) / "lib64", Path(os.environ[variable]) / "bin")


def _load(file: Path | str) -> Any:
    if isinstance(file, Path):
        # NVRTC opens its builtins by name alone, which finds them in this folder only if they are loaded already.
        pattern = "nvrtc-builtins64_*.dll" if sys.platform == "win32" else "libnvrtc-builtins.so.*"
        for builtins in sorted(file.parent.glob(pattern)):
            ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(file))


def _declare(library: Any) -> None:
    """Declare the argument types of the functions; ctypes would cut undeclared pointers to 32 bits."""
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    arguments = {
        "nvrtcVersion": [pointer, pointer],
        "nvrtcGetNumSupportedArchs": [pointer],
        "nvrtcGetSupportedArchs": [pointer],
        "nvrtcCreateProgram": [pointer, text, text, ctypes.c_int, pointer, pointer],
        "nvrtcCompileProgram": [pointer, ctypes.c_int, pointer],
        "nvrtcGetProgramLogSize": [pointer, pointer],
        "nvrtcGetProgramLog": [pointer, pointer],
        "nvrtcGetCUBINSize": [pointer, pointer],
        "nvrtcGetCUBIN": [pointer, pointer],
        "nvrtcDestroyProgram": [pointer],
        "nvrtcGetErrorString": [ctypes.c_int],
    }
    for name, kinds in arguments.items():
        getattr(library, name).argtypes = kinds
    library.nvrtcGetErrorString.restype = text
