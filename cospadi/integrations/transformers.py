"""The quantizer through which ``AutoModel...from_pretrained`` of transformers 5 reads our checkpoints.

transformers knows quantization methods from a table; a method that is not in it is skipped with a warning, and the
model comes out with random weights.  So this module must have been imported before a checkpoint is opened:
``cospadi.integrations.autoload`` sees to it as soon as ``cospadi`` is imported.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cospadi.backends import BACKENDS, install, restore_dense, sparse_modules
from cospadi.errors import UnavailableError
from cospadi.formats import (
    QUANT_METHOD,
    CheckpointConfig,
    check_checksums,
    check_headers,
    expected_tensors,
    read_header,
)
from cospadi.models import fuse_experts, split_experts


@register_quantization_config(QUANT_METHOD)
class CospadiConfig(QuantizationConfigMixin):
    """``quantization_config`` of config.json as transformers handles it.

    Attributes
    ----------
    checkpoint : CheckpointConfig
        The checked description.
    checksums : bool
        Whether the files are yet to be compared with SHA256SUMS; ``cospadi.load`` has done so before.
    """

    def __init__(self, **description: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # the enum of transformers has only its own
        self.checkpoint = CheckpointConfig.from_dict({"quant_method": QUANT_METHOD, **description})
        self.checksums = True

    def to_dict(self) -> dict[str, Any]:
        """Give what stands in config.json."""
        return self.checkpoint.to_dict()

    def get(self, key: str, default: Any = None) -> Any:
        """Give one value, as from a mapping, which transformers expects to find in a config that it has not read."""
        return self.to_dict().get(key, default)


@register_quantizer(QUANT_METHOD)
class CospadiQuantizer(HfQuantizer):
    """Puts compressed layers into the skeleton of a model before its weights are loaded."""

    quantization_config: CospadiConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a recommended backend that cannot run here."""
        name = self.quantization_config.checkpoint.backend
        state = BACKENDS.availability(name)
        if not state:
            raise UnavailableError(
                f"this checkpoint recommends backend {name!r}, which cannot run here ({state.reason}): "
                "open it with cospadi.load(path, backend='auto')"
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        checkpoint = self.quantization_config.checkpoint
        if checkpoint_files:
            if self.quantization_config.checksums:
                check_checksums(Path(checkpoint_files[0]).parent)
            # Shapes and dtypes are compared on the headers, before memory is taken for any of them.
            tensors = {key: tensor for file in checkpoint_files for key, tensor in read_header(Path(file)).items()}
            check_headers(checkpoint, tensors)
        checkpoint = checkpoint.renamed(_names_in(model, checkpoint.experts))
        split_experts(model, checkpoint.experts)
        members = [member.name for group in checkpoint.groups for member in group.members]
        checkpoint = checkpoint.renamed(_names_in(model, members))
        install(model, checkpoint)
        self.quantization_config.checkpoint = checkpoint
        for layer in sparse_modules(model).values():
            # The initialisers of some models (GPT-2) write to the weights of layers inside, loaded or not: they get a
            # tensor without memory until loading is over.
            layer.weight = torch.empty(layer.out_features, layer.in_features, device="meta")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        dtypes = {
            key: dtypes[0]
            for group in self.quantization_config.checkpoint.groups
            for key, (_, dtypes) in expected_tensors(group).items()
            if len(dtypes) == 1
        }
        for name, layer in sparse_modules(model).items():
            del layer.weight
            for local, parameter in layer.named_parameters(recurse=False):
                # transformers replaces parameters by trainable ones, and raises the precision of layers that a model
                # class lists as to be kept in float32, which is undone without loss.
                parameter.requires_grad_(False)
                dtype = dtypes.get(f"{name}.{local}", parameter.dtype)
                if parameter.dtype != dtype:
                    parameter.data = parameter.data.to(dtype)
            layer.forget()
        return model

    def update_weight_conversions(self, weight_conversions: Any, model: nn.Module) -> list[Any]:
        """Load every tensor under its own name: a checkpoint has the names of the model, not of other libraries."""
        return []

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Allow ``save_pretrained``, which gives the same tensors again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Refuse training of the packed tensors; adapters beside them are not affected."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Allow ``torch.compile``, after one call that prepares the layers."""
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        dequantize(model, dtype)
        return model


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Make all layers of a model dense again, in place, and its experts those of transformers."""
    restore_dense(model, dtype)
    fuse_experts(model)
    # Saved afterwards, the model shall have the names of the original checkpoint, which transformers derives afresh
    # when it remembers no conversions from loading.
    if hasattr(model, "_weight_conversions"):
        del model._weight_conversions


def _names_in(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Map the names of a checkpoint to those of a model that has a head which the checkpoint lacks, or the reverse."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = {name for name, _ in model.named_modules()}
    renamed = {}
    for name in names:
        for candidate in (name.removeprefix(prefix), prefix + name):
            if name not in modules and candidate in modules:
                renamed[name] = candidate
    return renamed
