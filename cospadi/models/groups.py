"""Which linear layers share a dictionary."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from cospadi.errors import UsageError
from cospadi.models.layers import Layer


@dataclass(frozen=True)
class Group:
    """One or more layers of equal input width that share one dictionary.

    Attributes
    ----------
    layers : tuple of Layer
        The members, in the order of the model.
    """

    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        """The first member's name, which names the group."""
        return self.layers[0].name

    @property
    def in_features(self) -> int:
        """Width of the members' inputs."""
        return self.layers[0].in_features

    @property
    def out_features(self) -> tuple[int, ...]:
        """Width of each member's output."""
        return tuple(layer.out_features for layer in self.layers)

    @property
    def shared_input(self) -> bool:
        """Whether all members receive the same tensor (true of a group of one)."""
        return len({layer.source for layer in self.layers}) == 1

    @property
    def inputs(self) -> tuple[tuple[Layer, ...], ...]:
        """The members by the tensor that they receive: those in one tuple have one Gram."""
        members: dict[str, list[Layer]] = {}
        for layer in self.layers:
            members.setdefault(layer.source, []).append(layer)
        return tuple(map(tuple, members.values()))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of layers in it, each once, in alphabetical order."""
        return tuple(sorted({layer.kind for layer in self.layers}))

    @property
    def last_block(self) -> int:
        """Index of the block after which all inputs of the group have been seen."""
        return max(layer.block for layer in self.layers)


def form_groups(layers: Sequence[Layer], grouping: str | Sequence[Sequence[str]]) -> list[Group]:
    """Divide layers into groups.

    Parameters
    ----------
    layers : sequence of Layer
        In the order of the model.
    grouping : str or sequence of sequences of str
        ``none``: one layer each; ``natural``: layers that receive the same input tensor (q, k, v; gate, up);
        ``natural:N``: the natural groups of the same kinds in runs of N blocks; ``consecutive:N``: runs of N blocks,
        one group for each kind of layer with equal input widths (the cross-layer sharing of arXiv 2509.22075 and
        2410.03765).  Or the names of the layers of each group; layers that are not named form natural groups.

    Returns
    -------
    list of Group
        In the order in which their last inputs are seen.

    Raises
    ------
    UsageError
        A name is unknown or given twice, a group is empty, or its layers have inputs of different widths.
    """
    if not isinstance(grouping, str):
        return _given_groups(layers, grouping)
    rule, _, length = grouping.partition(":")
    natural: dict[tuple[int, str], list[Layer]] = {}
    for layer in layers:
        natural.setdefault((layer.block, layer.source), []).append(layer)
    members: dict[object, list[Layer]] = {}
    for layer in layers:
        key: object = layer.name
        if rule == "natural":
            key = (layer.block, layer.source)
            if length:
                kinds = Group(tuple(natural[key])).kinds
                key = (layer.block // int(length), kinds, layer.in_features)
        elif rule == "consecutive":
            key = (layer.block // int(length), layer.kind, layer.in_features)
        members.setdefault(key, []).append(layer)
    return in_order([Group(tuple(run)) for run in members.values()])


def in_order(groups: Sequence[Group]) -> list[Group]:
    """Give groups in the order in which their last inputs are seen."""
    return sorted(groups, key=lambda group: group.last_block)


def _given_groups(layers: Sequence[Layer], names: Sequence[Sequence[str]]) -> list[Group]:
    known = {layer.name: layer for layer in layers}
    taken: dict[str, int] = {}
    groups = []
    for index, run in enumerate(names):
        if isinstance(run, str) or not run:
            raise UsageError(f"group {index + 1} is {run!r}: expected a list of at least one layer name")
        for name in run:
            if name not in known:
                match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
                raise UsageError(
                    f"group {index + 1} names {name!r}, which is not one of the {len(known)} layers to compress; "
                    f"the nearest is {match[0]!r}"
                )
            if name in taken:
                raise UsageError(f"layer {name} is named in group {taken[name]} and in group {index + 1}: name it once")
            taken[name] = index + 1
        chosen = set(run)
        group = Group(tuple(layer for layer in layers if layer.name in chosen))
        for layer in group.layers:
            if layer.in_features != group.in_features:
                raise UsageError(
                    f"group {index + 1}: {group.name} has {group.in_features} input features and {layer.name} has "
                    f"{layer.in_features}; layers that share a dictionary need the same input width"
                )
        groups.append(group)
    rest = [layer for layer in layers if layer.name not in taken]
    return in_order(groups + form_groups(rest, "natural"))
