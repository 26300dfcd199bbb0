"""Mixture-of-experts weights as one linear layer per expert, so that they can be compressed like any other layer.

transformers 5 stores the experts of a block as two tensors, ``gate_up_proj`` (experts, 2 * intermediate, hidden) and
``down_proj`` (experts, hidden, intermediate), in a module whose class is decorated with ``use_experts_implementation``.
The decorator's attributes say how the tensors are laid out; only the plain layout is split: gated, gate rows before up
rows, no biases, not transposed, no norm of its own.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.errors import CheckpointError, UsageError

_PLAIN_LAYOUT = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}


class ExpertLinears(nn.Module):
    """Experts as linear layers: the same sum over the chosen experts as the module that it replaces.

    Parameters
    ----------
    fused : Module
        The experts module of transformers; kept as an empty shell for ``fused``.

    Attributes
    ----------
    gate_up : ModuleList of Linear, (hidden -> 2 * intermediate)
        Gate features first, then up features.
    down : ModuleList of Linear, (intermediate -> hidden)
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        gate_up, down = fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj")
        self.num_experts = gate_up.shape[0]
        self.act_fn = fused.get_submodule("act_fn")
        self.gate_up = nn.ModuleList(_linear(weight, gate_up.requires_grad) for weight in gate_up.detach())
        self.down = nn.ModuleList(_linear(weight, down.requires_grad) for weight in down.detach())
        # The shell goes into a tuple, so that its parameters are not registered here.
        for name in ("gate_up_proj", "down_proj"):
            setattr(fused, name, nn.Parameter(fused.get_parameter(name).detach().to("meta")))
        self._shell = (fused,)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum the chosen experts' outputs with the router's weights.

        Parameters
        ----------
        hidden_states : Tensor, shape (n_tokens, hidden)
        top_k_index : Tensor, shape (n_tokens, top_k), int64
            Experts chosen for every token; ``num_experts`` stands for none.
        top_k_weights : Tensor, shape (n_tokens, top_k)
        """
        total = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue
            token, place = torch.where(top_k_index == expert)
            gate, up = self.gate_up[expert](hidden_states[token]).chunk(2, dim=-1)
            output = self.down[expert](self.act_fn(gate) * up) * top_k_weights[token, place, None]
            total.index_add_(0, token, output.to(total.dtype))
        return total

    def fused(self) -> nn.Module:
        """Give the experts module of transformers with the weights of the linear layers."""
        module = self._shell[0]
        for name, layers in (("gate_up_proj", self.gate_up), ("down_proj", self.down)):
            weight = torch.stack([layer.get_parameter("weight").detach() for layer in layers])
            setattr(module, name, nn.Parameter(weight, layers[0].get_parameter("weight").requires_grad))
        return module.train(self.training)


def split_experts(model: nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """Replace modules of fused experts by ``ExpertLinears``, in place; the weights are views, not copies.

    Parameters
    ----------
    model : Module
        On any device, the meta device included.
    names : iterable of str, optional
        Which ones; all that are understood if not given.

    Returns
    -------
    list of str
        The modules that were replaced, in the order of the model.

    Raises
    ------
    CheckpointError
        A named module is missing or is not understood.
    """
    found = [name for name, module in model.named_modules() if _is_plain(module)]
    if names is not None:
        unknown = sorted(set(names) - set(found))
        if unknown:
            raise CheckpointError(f"the model has no experts {unknown[0]} of the layout that cospadi splits")
        found = [name for name in found if name in set(names)]
    for name in found:
        model.set_submodule(name, ExpertLinears(model.get_submodule(name)))
    return found


def fuse_experts(model: nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """Put the experts modules of transformers back, in place; the inverse of ``split_experts``.

    Parameters
    ----------
    model : Module
    names : iterable of str, optional
        Which ones; all that were split if not given.

    Returns
    -------
    list of str
        The modules that were put back, in the order of the model.

    Raises
    ------
    UsageError
        An expert's layers are still compressed.
    """
    split = {name: module for name, module in model.named_modules() if isinstance(module, ExpertLinears)}
    if names is not None:
        split = {name: split[name] for name in split if name in set(names)}
    for name, module in split.items():
        if not all(type(layer) is nn.Linear for layer in (*module.gate_up, *module.down)):
            raise UsageError(f"{name}: restore the dense layers before the experts are fused")
        model.set_submodule(name, module.fused())
    return list(split)


def _is_plain(module: nn.Module) -> bool:
    """Tell whether a module is one of transformers' experts in the plain layout."""
    if not hasattr(module, "has_gate") or any(getattr(module, k, v) is not v for k, v in _PLAIN_LAYOUT.items()):
        return False
    gate: Any = getattr(type(module), "_apply_gate", None)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    if getattr(gate, "__name__", "") != "_default_apply_gate" or set(shapes) != {"gate_up_proj", "down_proj"}:
        return False
    if not isinstance(getattr(module, "act_fn", None), nn.Module) or any(len(s) != 3 for s in shapes.values()):
        return False
    experts, hidden, intermediate = shapes["down_proj"]
    return shapes["gate_up_proj"] == (experts, 2 * intermediate, hidden)


def _linear(weight: Tensor, requires_grad: bool) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad)
    return layer
