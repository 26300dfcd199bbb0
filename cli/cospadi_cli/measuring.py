"""Load models and measure them, for the commands that evaluate or generate."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cospadi_cli import render

if TYPE_CHECKING:
    from cospadi.config import CompressionConfig
    from cospadi.evaluation.choices import Question
    from cospadi.evaluation.comparison import Protocol


def check_backend(name: str) -> None:
    """Refuse a backend that is unknown or cannot run here.

    Raises
    ------
    UsageError
        With the reason.
    """
    from cospadi.backends.base import BACKENDS
    from cospadi.errors import UnavailableError

    state = BACKENDS.availability(name)
    if not state:
        raise UnavailableError(f"backend {name!r} cannot run here: {state.reason}")


def protocol(
    model: str | Path,
    name: str,
    text: str,
    n_tokens: int,
    window: int,
    prompt: str | None = None,
    questions: "list[Question] | None" = None,
) -> "Protocol | None":
    """Cut the evaluation text with the model's tokenizer; None for a model that is not a causal language model.

    Raises
    ------
    UsageError
        There is no such model, or the text is too short.
    """
    from cospadi.calibration.data import token_windows
    from cospadi.errors import UsageError
    from cospadi.evaluation.comparison import Protocol
    from cospadi.models import model_class, read_config, read_tokenizer

    if not model_class(read_config(model)).can_generate():
        return None
    if window > n_tokens:
        raise UsageError(
            f"the evaluation's {n_tokens} tokens are fewer than one window of {window}: ask for more tokens"
        )
    return Protocol(name, token_windows(read_tokenizer(model), text, window, n_tokens // window), prompt, questions)


def compare_folders(
    dense: str | Path, compressed: str | Path, protocol: "Protocol", config: "CompressionConfig", quiet: bool
) -> dict[str, Any]:
    """Measure the dense and the compressed model one after the other, so that only one is in memory."""
    from cospadi.evaluation.comparison import compare

    results = [
        measure_folder(path, protocol, config.backend, config.device, f"evaluating {what}", quiet)
        for path, what in ((dense, "the dense model"), (compressed, "the compressed model"))
    ]
    return compare(results[0], results[1], protocol)


def measure_folder(
    path: str | Path, protocol: "Protocol", backend: str, device: str, label: str, quiet: bool
) -> dict[str, Any]:
    """Load one model, dense or compressed, and measure it."""
    from cospadi.evaluation.comparison import measure
    from cospadi.models import read_tokenizer

    with render.working(label, quiet):
        return measure(load_model(path, backend, device), read_tokenizer(path), protocol)


def load_model(path: str | Path, backend: str = "auto", device: str = "auto") -> Any:
    """Load a causal language model, dense or compressed, in evaluation mode: in float32 on a CPU.

    Raises
    ------
    UsageError
        There is no such model, or it is not a causal language model.
    """
    import torch

    from cospadi.errors import UsageError
    from cospadi.formats.checkpoint import QUANT_METHOD
    from cospadi.loading import load
    from cospadi.models import model_class, open_model, read_config

    config = read_config(path)
    if not model_class(config).can_generate():
        raise UsageError(f"{path} is not a causal language model: perplexity and generation need one")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method != QUANT_METHOD:
        return open_model(str(path), torch.device(device)).model
    # CPUs compute bfloat16 slowly, some of them in emulation; on a GPU the stored dtype is the one that is deployed.
    dtype = torch.float32 if device == "cpu" else None
    return load(path, backend=backend, dtype=dtype, device=device)
