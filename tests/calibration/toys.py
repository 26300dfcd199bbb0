"""Small models of blocks made by hand, for cases that no tiny transformer has."""

import torch
from torch import Tensor, nn

from cospadi.calibration.lockstep import WalkedModel
from cospadi.calibration.sensitivity import LossGradients, walk_statistics

WIDTH = 6


class Toy(nn.Module):
    """Random token vectors through blocks, one after the other."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.embedding = nn.Parameter(torch.randn(50, WIDTH, generator=generator))
        self.layers = nn.ModuleList(blocks)
        with torch.no_grad():
            for parameter in self.layers.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / WIDTH**0.5)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding[input_ids]
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def linear(out_features: int = WIDTH) -> nn.Linear:
    return nn.Linear(WIDTH, out_features, bias=False)


class Plain(nn.Module):
    """One linear layer and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.only = linear()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.only(hidden)


class InPlace(nn.Module):
    """Works in place on what it was given and on what its layer was given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(), linear()

    def forward(self, hidden: Tensor) -> Tensor:
        hidden += 1
        inner = self.first(hidden)
        hidden.mul_(2)
        inner.add_(hidden)
        return self.second(inner)


class Routed(nn.Module):
    """Experts without a common input, the first one chosen where a linear layer says so."""

    def __init__(self) -> None:
        super().__init__()
        self.router = linear(1)
        self.experts = nn.ModuleList([linear(), linear(), linear()])

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, WIDTH)
        chosen = torch.where(self.router(rows)[:, 0] > 0, 0, 1)
        result = rows.clone()
        for index in chosen.unique().tolist():
            result[chosen == index] += self.experts[index](rows[chosen == index])
        return result.reshape(hidden.shape)


class Twice(nn.Module):
    """Runs its layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.only = linear()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.only(torch.tanh(self.only(hidden)))


class Ungraded(nn.Module):
    """Switches gradients off."""

    def __init__(self) -> None:
        super().__init__()
        self.only = linear()

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        return self.only(hidden)


def collect_statistics(model, mapped, call, windows, cache=None, **options):
    """The statistics of all layers at once, by source; see ``walk_statistics`` and ``LossGradients``."""
    found, loss = (
        {},
        LossGradients(**{key: options.pop(key) for key in ("labels", "seed", "weighted") if key in options}),
    )
    for statistics in walk_statistics(WalkedModel(model, call, cache), mapped, windows, loss, **options):
        found.update(statistics)
    return found
