"""Which linear layers share a dictionary."""

from collections.abc import Sequence
from dataclasses import dataclass

from cospadi.layers import Layer


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
        """Whether all members receive the very same tensor (true of a group of one)."""
        return len({layer.source for layer in self.layers}) == 1

    @property
    def last_block(self) -> int:
        """Index of the block after which all inputs of the group have been seen."""
        return max(layer.block for layer in self.layers)


def form_groups(layers: Sequence[Layer], grouping: str) -> list[Group]:
    """Divide layers into groups.

    Parameters
    ----------
    layers : sequence of Layer
        In the order of the model.
    grouping : str
        ``none``: one layer each; ``natural``: layers that receive the same input tensor (q, k, v; gate, up);
        ``consecutive:N``: runs of N blocks, one group for each kind of layer with equal input widths (the cross-layer
        sharing of arXiv 2509.22075 and 2410.03765).

    Returns
    -------
    list of Group
        In the order in which their last inputs are seen.
    """
    members: dict[object, list[Layer]] = {}
    for layer in layers:
        key: object = layer.name
        if grouping == "natural":
            key = (layer.block, layer.source)
        elif grouping.startswith("consecutive:"):
            run = layer.block // int(grouping.partition(":")[2])
            key = (run, layer.kind, layer.in_features)
        members.setdefault(key, []).append(layer)
    return sorted((Group(tuple(run)) for run in members.values()), key=lambda group: group.last_block)
