"""Statistics of one input and its layers: the Gram, and the sensitivity of the loss to errors in each output."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cospadi.calibration.gram import Gram, fold, unfold
from cospadi.errors import CheckpointError, NumericalError

_FORMAT = "cospadi source statistics 2"
_NO_OUTPUT_GRAMS = {"output_grams": False}
"""A field of the file format that other writers may set."""


class OutputSensitivity:
    """Second moments of g, the gradient of the summed token loss at one layer's output, summed over tokens.

    Parameters
    ----------
    name : str
        Layer name, for error texts.
    out_features : int
        Width of the output.
    device : torch.device, optional
        Where the sums are kept.

    Attributes
    ----------
    squares : Tensor, shape (out_features,), float64
        The sum of g_j^2.
    n_tokens : int
        Tokens that reached the layer; 0 for an expert that was never chosen.
    """

    def __init__(self, name: str, out_features: int, device: torch.device | str = "cpu") -> None:
        self.name = name
        self.squares = torch.zeros(out_features, dtype=torch.float64, device=device)
        self.n_tokens = 0

    def add(self, gradient: Tensor) -> Tensor:
        """Add gradients of shape (..., out_features) and give each token's sum of squares, shape (n_tokens,).

        Raises
        ------
        NumericalError
            A gradient is NaN or infinite, or overflows float32 when squared.
        """
        rows = gradient.detach().reshape(-1, gradient.shape[-1])
        rows = rows if rows.dtype == torch.float64 else rows.to(torch.float32)
        squares = rows.square()
        columns = squares.sum(0)
        if not bool(torch.isfinite(columns).all()):
            raise NumericalError(f"{self.name}: the gradient at its output holds NaN, infinity or overflows float32")
        self.squares += columns
        return squares.sum(1)

    def merge(self, other: "OutputSensitivity") -> None:
        """Add the moments of other tokens of the same layer."""
        if other.squares.shape != self.squares.shape:
            raise ValueError(f"{self.name}: cannot merge sensitivities of another width")
        self.squares += other.squares.to(self.squares.device)
        self.n_tokens += other.n_tokens


class SourceStatistics:
    """What one backward pass over the calibration tokens tells of the layers that receive one input X.

    All sums are additive: the statistics of several workers merge into those of all their tokens.  Expectations are
    over all tokens of the run, also for experts, which see a part of them: a rarely chosen expert matters little.

    Parameters
    ----------
    name : str
        Name of the first layer that receives the input.
    in_features : int
        Width of the input.
    out_features : mapping of str to int
        Width of each layer's output.
    grams, weighted : bool
        Which of the optional sums to keep.
    device : torch.device, optional
        Where the sums are kept.
    note : str
        How the loss was defined; only statistics of the same loss merge.

    Attributes
    ----------
    n_tokens : int
        Tokens of the run.
    gram : Gram or None
        ``X^T X``, as ``GramCollector`` gives it.
    layers : dict of str to OutputSensitivity
        By layer name.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: Mapping[str, int],
        *,
        grams: bool = True,
        weighted: bool = False,
        device: torch.device | str = "cpu",
        note: str = "",
    ) -> None:
        self.name = name
        self.in_features = in_features
        self.note = note
        self.n_tokens = 0
        self.gram = Gram(name, in_features, device) if grams else None
        # Not yet divided by the mean weight, which only the end of the run knows; its n_tokens are X's rows.
        self._weighted = Gram(name, in_features, device) if weighted else None
        self._weight = torch.zeros((), dtype=torch.float64, device=device)
        self.layers = {layer: OutputSensitivity(layer, width, device) for layer, width in out_features.items()}

    def squares(self, layer: str) -> Tensor:
        """Give E[g_j^2] over the run's tokens, shape (out_features,), float64; zeros for a layer without tokens."""
        return self.layers[layer].squares / max(1, self.n_tokens)

    def weighted_gram(self) -> Gram:
        """Give ``sum_t w_t x_t x_t^T``, where w_t is the sum of squares of g over all layers' outputs at token t.

        The weights are scaled to a mean of 1 over the tokens that reached the layers, so that the Gram compares with
        the plain one.  When every weight is zero the Gram is zero and counts no tokens.

        Raises
        ------
        ValueError
            It was not collected.
        """
        if self._weighted is None:
            raise ValueError(f"{self.name}: the weighted Gram was not collected")
        gram = Gram(self.name, 0)
        weight = float(self._weight)
        if weight > 0:
            gram.matrix = self._weighted.matrix * (self._weighted.n_tokens / weight)
            gram.n_tokens = self._weighted.n_tokens
        else:
            gram.matrix = torch.zeros_like(self._weighted.matrix)
        return gram

    def add_inputs(self, inputs: Tensor) -> None:
        """Add inputs, shape (..., in_features), to the plain Gram and count them for the mean weight."""
        if self.gram is not None:
            self.gram.add(inputs)
        if self._weighted is not None:
            self._weighted.n_tokens += inputs.numel() // inputs.shape[-1]

    def add_weighted(self, inputs: Tensor, weights: Tensor) -> None:
        """Add inputs, shape (..., in_features), to the weighted Gram with weights of shape (n_tokens,)."""
        assert self._weighted is not None
        counted = self._weighted.n_tokens
        self._weighted.add(inputs.reshape(-1, inputs.shape[-1]) * weights.sqrt()[:, None].to(inputs.device))
        self._weighted.n_tokens = counted  # add_inputs counts: an input whose outputs have no gradient counts too
        self._weight += weights.sum(dtype=torch.float64)

    def merge(self, other: "SourceStatistics") -> None:
        """Add the statistics of other tokens of the same layers.

        Raises
        ------
        ValueError
            They are of other layers, another loss or another choice of sums; nothing was added.
        """
        if self._description() != other._description():
            raise ValueError(f"{self.name}: cannot merge {self._description()} and {other._description()}")
        self.n_tokens += other.n_tokens
        for own, more in ((self.gram, other.gram), (self._weighted, other._weighted)):
            if own is not None and more is not None:
                own.merge(more)
        self._weight += other._weight.to(self._weight.device)
        for layer, sensitivity in self.layers.items():
            sensitivity.merge(other.layers[layer])

    def to(self, device: torch.device | str) -> "SourceStatistics":
        """Give the same sums on a device."""
        if all(tensor.device == torch.device(device) for tensor in self._tensors().values()):
            return self
        there = SourceStatistics(**self._description(), device=device)
        there._restore({key: tensor.to(device) for key, tensor in self._tensors().items()}, self._counts())
        return there

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, exactly; of the Grams, which are symmetric, one half."""
        halves = self._grams()
        tensors = {
            key: fold(tensor.cpu()) if key in halves else tensor.cpu().contiguous()
            for key, tensor in self._tensors().items()
        }
        description = json.dumps(self._description() | _NO_OUTPUT_GRAMS)
        counts = json.dumps(self._counts())
        save_file(tensors, path, metadata={"format": _FORMAT, "description": description, "counts": counts})

    @classmethod
    def load(cls, path: str | Path) -> "SourceStatistics":
        """Read what ``save`` wrote, onto the CPU.

        Raises
        ------
        CheckpointError
            The file is missing or is not what ``save`` writes.
        """
        try:
            with safe_open(path, "pt", backend="pread") as file:  # a mapped file would count beside its copy
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"format {metadata.get('format')!r}, expected {_FORMAT!r}")
            description = json.loads(metadata["description"])
            if description.pop("output_grams"):
                raise ValueError("Grams of output gradients, which this version does not keep")
            statistics = cls(**description)
            for key, gram in statistics._grams().items():
                tensors[key] = unfold(tensors[key], len(gram.matrix))
            statistics._restore(tensors, json.loads(metadata["counts"]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path}: not saved source statistics ({error})") from error
        return statistics

    def _description(self) -> dict[str, Any]:
        """Give the arguments that make an empty object like this one."""
        return {
            "name": self.name,
            "in_features": self.in_features,
            "out_features": {layer: own.squares.shape[0] for layer, own in self.layers.items()},
            "grams": self.gram is not None,
            "weighted": self._weighted is not None,
            "note": self.note,
        }

    def _grams(self) -> dict[str, Gram]:
        """Give all Grams that are kept, by their names in a file."""
        kept = {"gram": self.gram, "weighted": self._weighted}
        return {key: gram for key, gram in kept.items() if gram is not None}

    def _tensors(self) -> dict[str, Tensor]:
        """Give all sums, by their names in a file."""
        sums = {f"squares/{layer}": own.squares for layer, own in self.layers.items()}
        return {"weight": self._weight, **sums, **{key: gram.matrix for key, gram in self._grams().items()}}

    def _counts(self) -> dict[str, Any]:
        """Give all token counts, by their names in a file."""
        return {
            "run": self.n_tokens,
            "layers": {layer: own.n_tokens for layer, own in self.layers.items()},
            "grams": {key: gram.n_tokens for key, gram in self._grams().items()},
        }

    def _restore(self, tensors: dict[str, Tensor], counts: dict[str, Any]) -> None:
        """Fill an empty object from a file; what does not fit is refused."""
        own = self._tensors()
        if set(own) != set(tensors):
            raise ValueError(f"tensors {sorted(set(own) ^ set(tensors))} are missing or too many")
        for key, place in own.items():
            found = tensors[key]
            if found.shape != place.shape or found.dtype != place.dtype:
                raise ValueError(f"{key} has shape {tuple(found.shape)}, {found.dtype}")
            place.data = found
        self.n_tokens = int(counts["run"])
        for layer, sensitivity in self.layers.items():
            sensitivity.n_tokens = int(counts["layers"][layer])
        for key, gram in self._grams().items():
            gram.n_tokens = int(counts["grams"][key])
