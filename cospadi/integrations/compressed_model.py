"""Open a compressed checkpoint, or write it out as an ordinary dense model.  Neither runs code from the folder."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from cospadi.backends import BACKENDS
from cospadi.errors import CheckpointError, UnavailableError, UsageError
from cospadi.files import read_json, shown, stays_inside
from cospadi.formats import CHECKSUMS, QUANT_METHOD, read_headers, verify_checkpoint
from cospadi.models import errors_in_one_line, model_class, refuse_absurd_counts

_NOT_COPIED = {"config.json", "generation_config.json", "README.md", "report.json", "recipe.yaml", CHECKSUMS}
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".pkl", ".gguf", ".py")


def load(
    path: str | Path,
    backend: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    checksums: bool = True,
) -> Any:
    """Load a compressed model, ready to run.

    Parameters
    ----------
    path : Path
        A folder that ``compress`` or ``save_pretrained`` wrote.
    backend : str, optional
        Registry name of the runtime; the one that the checkpoint recommends if not given.
    dtype : torch.dtype or str, optional
        Of the tensors outside the compressed layers; as stored if not given.
    device : torch.device, optional
        Where to put the model; the CPU if not given.
    checksums : bool
        Compare the files with SHA256SUMS, where the folder has one, which reads all of them once more.

    Returns
    -------
    PreTrainedModel
        In evaluation mode, of the class that config.json names.

    Raises
    ------
    UsageError
        The folder is no compressed checkpoint (says what it is), the backend is unknown, or transformers has no class
        of that name.
    UnavailableError
        The backend cannot run on this machine.
    CheckpointError
        The checkpoint is damaged.
    """
    folder = Path(path)
    require_checkpoint(folder)
    checkpoint = verify_checkpoint(folder, checksums=checksums)
    name = backend or checkpoint.backend
    state = BACKENDS.availability(name)
    if not state:
        whose = "" if backend else ", which the checkpoint recommends,"
        raise UnavailableError(f"backend {name!r}{whose} cannot run here: {state.reason}; backend='auto' chooses one")
    with errors_in_one_line(folder):
        model, info = _open(folder, name, dtype)
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise CheckpointError(f"{folder}: the model needs tensor {lacking[0]}, which is missing or of another shape")
    # The choice is for this run: what is saved keeps the recommendation.
    described = model.config.quantization_config
    described.checkpoint = described.checkpoint.with_backend(checkpoint.backend)
    return model if device is None else model.to(device)


def _open(folder: Path, backend: str, dtype: torch.dtype | str | None) -> tuple[Any, dict[str, Any]]:
    """Give the model of a checked folder, with a backend for this run, and what transformers says of its tensors."""
    from transformers import AutoConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    described = AutoQuantizationConfig.from_dict({**config.quantization_config, "backend": backend})
    described.checksums = False  # they have been compared, or are not to be
    config.quantization_config = described
    refuse_absurd_counts(config, read_headers(folder))
    model, info = model_class(config).from_pretrained(
        folder,
        config=config,
        dtype=dtype or "auto",
        output_loading_info=True,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return model, info


def decompress(path: str | Path, out: str | Path, dtype: torch.dtype | str | None = None) -> Path:
    """Write a compressed checkpoint as a dense model that needs no plug-in.

    The compressed layers become dense ones of the class that they replaced, experts become transformers' own again, and
    the tokenizer's files are copied.

    Parameters
    ----------
    path : Path
        The compressed checkpoint.
    out : Path
        A folder that does not exist or is empty.
    dtype : torch.dtype or str, optional
        Of the dense weights; that of the stored model if not given.

    Returns
    -------
    Path
        ``out``.

    Raises
    ------
    UsageError
        ``out`` is in use; or see ``load``.
    """
    folder, out = Path(path), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"output {out} exists and is not an empty folder: choose a new folder")
    model = load(folder, backend="reference", dtype=dtype)
    model = model.dequantize(dtype=model.dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and renamed at the end, so that an interrupted run leaves no half of a model.
    work = out.parent / f".{out.name}.{os.getpid()}.partial"
    work.mkdir()
    try:
        model.save_pretrained(work)
        for file in _companions(folder):
            shutil.copyfile(file, work / file.name)
        if out.exists():
            out.rmdir()
        work.replace(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def require_checkpoint(folder: Path) -> None:
    """Refuse what is not a folder of a compressed model, and say what it is instead.

    Raises
    ------
    UsageError
        It is something else.
    """
    if not folder.exists():
        raise UsageError(f"{folder}: no such folder; to use a model of the hub, download it first")
    if not folder.is_dir():
        kind = "a GGUF file" if folder.suffix == ".gguf" else "a file"
        raise UsageError(f"{folder} is {kind}: give the folder of a model compressed by cospadi")
    if not (folder / "config.json").exists():
        adapter = (folder / "adapter_config.json").exists()
        what = "an adapter (adapter_config.json)" if adapter else "not a model folder: it has no config.json"
        raise UsageError(f"{folder} is {what}; give the folder of a model compressed by cospadi")
    described = read_json(folder, "config.json").get("quantization_config")
    if described is None:
        raise UsageError(f"{folder} is a dense model: open it with transformers, or compress it first")
    method = described.get("quant_method") if isinstance(described, dict) else described
    if method != QUANT_METHOD:
        raise UsageError(f"{folder} is a model quantised with {shown(method)}, not one compressed by cospadi")


def _companions(folder: Path) -> list[Path]:
    """Give the files that go with a model, such as the tokenizer's: no weights, no code, no links that leave it."""
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and not file.name.startswith(".")
        and file.name not in _NOT_COPIED
        and not file.name.endswith(_WEIGHTS)
        and stays_inside(folder, file)
    ]
