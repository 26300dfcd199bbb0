"""Small checkpoints made by hand: every linear layer of a tiny model replaced by random factors."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cospadi.formats.checkpoint import CheckpointConfig, ShardWriter
from cospadi.formats.factorization import GroupSpec, SparseFactorization
from cospadi.formats.packing import pack_group, unpack_group
from cospadi.models.experts import split_experts
from cospadi.models.layers import map_model

from .helpers import tiny_model, token_windows


@dataclass
class Made:
    """A checkpoint folder, its description, and the dense model that it stands for."""

    folder: Path
    config: CheckpointConfig
    dense: nn.Module


def random_group(
    members,
    in_features,
    n_atoms,
    generator,
    format="bitmask",
    value_dtype="float32",
    biases=None,
    shared=True,
    dictionary_dtype=None,
):
    """A packed random group: description and tensors."""
    scale = (in_features * n_atoms) ** -0.25
    coefficients = {}
    for name, width in members.items():
        matrix = torch.randn(n_atoms, width, generator=generator) * scale
        coefficients[name] = matrix * (torch.rand(matrix.shape, generator=generator) < 0.5)
    dictionary = torch.randn(in_features, n_atoms, generator=generator) * scale
    factors = SparseFactorization(dictionary, coefficients)
    return pack_group(factors, format, value_dtype, biases or {}, shared, dictionary_dtype)


def random_output_group(
    name, in_features, out_features, n_atoms, generator, format="bitmask", value_dtype="float32", biases=None
):
    """A packed random layer whose dictionary is on the side of the outputs: description and tensors."""
    scale = (in_features * n_atoms) ** -0.25
    sparse = torch.randn(n_atoms, in_features, generator=generator) * scale
    sparse *= torch.rand(sparse.shape, generator=generator) < 0.5
    dictionary = torch.randn(out_features, n_atoms, generator=generator) * scale
    factors = SparseFactorization(dictionary, {name: sparse}, side="output")
    return pack_group(factors, format, value_dtype, biases or {}, True)


def make_checkpoint(
    folder,
    architecture="llama",
    format="bitmask",
    value_dtype="float32",
    dtype=torch.float32,
    max_shard_bytes=5 * 10**9,
    output_sided=(),
):
    """Write a checkpoint of a tiny model; groups are the layers that receive the same input.

    Layers alone in their group whose name ends in one of ``output_sided`` have their dictionary on that side.
    """
    model = tiny_model(architecture).to(dtype)
    dense = copy.deepcopy(model)
    experts = split_experts(model)
    layers = map_model(model, lambda: model(input_ids=token_windows(2, 12))).layers
    by_source = {}
    for layer in layers:
        by_source.setdefault(layer.source, []).append(layer)
    generator = torch.Generator().manual_seed(1)
    groups: list[tuple[GroupSpec, dict]] = []
    for group in by_source.values():
        members = {layer.name: layer.out_features for layer in group}
        biases = {layer.name: model.get_submodule(layer.name).bias for layer in group if layer.bias}
        width = group[0].in_features
        if len(group) == 1 and group[0].name.endswith(output_sided):
            (name, outputs), *_ = members.items()
            made = random_output_group(name, width, outputs, outputs + 3, generator, format, value_dtype, biases)
        else:
            made = random_group(members, width, width + 3, generator, format, value_dtype, biases)
        groups.append(made)
    config = CheckpointConfig(tuple(spec for spec, _ in groups), tuple(experts), "auto", "0.1.0")
    names = {member.name for spec in config.groups for member in spec.members}
    with ShardWriter(folder, max_shard_bytes) as writer:
        for spec, tensors in groups:
            writer.add(spec.name, tensors)
        for key, tensor in model.state_dict().items():
            if key.rpartition(".")[0] not in names and key not in model.all_tied_weights_keys:
                writer.add(key, {key: tensor})
    _write_config(folder, model, config, dtype)
    _densify(dense, groups, experts, dtype)
    return Made(Path(folder), config, dense)


def edit_config(folder, change):
    """Apply a function to the parsed config.json and write it back."""
    path = Path(folder) / "config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def _write_config(folder, model, config, dtype):
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    edit_config(folder, lambda data: data.update(quantization_config=config.to_dict()))


def _densify(dense, groups, experts, dtype):
    """Put D S into the dense model, by hand: nn.Linear, Conv1D and fused experts."""
    with torch.no_grad():
        for spec, tensors in groups:
            factors = unpack_group(spec, tensors)
            for name in factors.coefficients:
                product = factors.to_dense(name, torch.float64).to(dtype)
                owner = next((e for e in experts if name.startswith(f"{e}.")), None)
                if owner:
                    kind, index = name.removeprefix(f"{owner}.").split(".")
                    fused = dense.get_submodule(owner)
                    getattr(fused, f"{kind}_proj")[int(index)] = product.T
                else:
                    layer = dense.get_submodule(name)
                    layer.weight.copy_(product.T if isinstance(layer, nn.Linear) else product)
