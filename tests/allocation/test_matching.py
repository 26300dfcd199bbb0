"""Which layers share a dictionary: named in the recipe, in runs, or matched by distance."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.allocation.matching import match_groups, pair_distances, window_distance
from cospadi.calibration.gram import Gram
from cospadi.errors import UsageError
from cospadi.models.groups import Group, form_groups
from cospadi.models.layers import Layer


def block(index, d=8):
    """The layers of one block of a Llama: q, k and v share an input."""
    prefix = f"blocks.{index}."
    shapes = {"q": (d, d), "k": (d, 4), "v": (d, 4), "o": (d, d), "down": (2 * d, d)}
    return [
        Layer(prefix + kind, index, kind, prefix + ("q" if kind in "qkv" else kind), *shape, bias=False)
        for kind, shape in shapes.items()
    ]


def model(n_blocks=4):
    return [layer for index in range(n_blocks) for layer in block(index)]


def names(groups):
    return [[layer.name for layer in group.layers] for group in groups]


def statistics(layers, seed=0, n_tokens=64):
    """Random weights, and Grams of random inputs."""
    rng = np.random.default_rng(seed)
    weights = {la.name: torch.from_numpy(rng.standard_normal((la.in_features, la.out_features))) for la in layers}
    grams = {}
    for layer in layers:
        if layer.source not in grams:
            gram = grams[layer.source] = Gram(layer.source, layer.in_features)
            mixing = rng.standard_normal((layer.in_features, layer.in_features))
            gram.add(torch.from_numpy(rng.standard_normal((n_tokens, layer.in_features)) @ mixing))
    return weights, grams


def test_natural_runs_join_the_natural_groups_of_several_blocks():
    groups = form_groups(model(), "natural:2")
    assert [f"blocks.{b}.{kind}" for b in (0, 1) for kind in "qkv"] in names(groups)
    assert ["blocks.2.down", "blocks.3.down"] in names(groups)
    assert len(groups) == 6
    assert sorted(name for group in names(groups) for name in group) == sorted(la.name for la in model())
    first = groups[names(groups).index([f"blocks.{b}.{kind}" for b in (0, 1) for kind in "qkv"])]
    assert not first.shared_input
    assert [[la.kind for la in layers] for layers in first.inputs] == [["q", "k", "v"]] * 2
    assert names(form_groups(model(), "natural:1")) == names(form_groups(model(), "natural"))


def test_groups_may_be_given_and_the_rest_is_natural():
    chosen = [["blocks.3.o", "blocks.0.o", "blocks.1.q"], ["blocks.2.k"]]
    groups = form_groups(model(), chosen)
    assert ["blocks.0.o", "blocks.1.q", "blocks.3.o"] in names(groups)  # in the order of the model
    assert ["blocks.2.k"] in names(groups)
    assert ["blocks.1.k", "blocks.1.v"] in names(groups)
    assert ["blocks.0.q", "blocks.0.k", "blocks.0.v"] in names(groups)
    assert sorted(name for group in names(groups) for name in group) == sorted(la.name for la in model())
    assert [g.last_block for g in groups] == sorted(g.last_block for g in groups)
    assert names(form_groups(model(), [])) == names(form_groups(model(), "natural"))


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ([["blocks.0.o", "blocks.1.oo"]], "group 1 names 'blocks.1.oo'.*one of the 20 layers.*nearest is 'blocks.1.o'"),
        ([["blocks.0.o", "blocks.0.down"]], "blocks.0.o has 8 input features and blocks.0.down has 16"),
        ([["blocks.0.o"], ["blocks.1.o", "blocks.0.o"]], "blocks.0.o is named in group 1 and in group 2"),
        ([["blocks.0.o", "blocks.0.o"]], "blocks.0.o is named in group 1 and in group 1"),
        ([["blocks.0.o"], []], "group 2 is .*at least one layer"),
        (["blocks.0.o"], "group 1 is 'blocks.0.o'.*expected a list"),
    ],
)
def test_groups_that_make_no_sense_are_refused_in_one_line(chosen, text):
    with pytest.raises(UsageError, match=text) as caught:
        form_groups(model(), chosen)
    assert "\n" not in str(caught.value)


def best_pairing(distances):
    """The most pairs, and among those the least sum, by trying all: (number of pairs, sum)."""
    n = len(distances)
    best = (0, 0.0)
    edges = [(i, j) for i, j in itertools.combinations(range(n), 2) if math.isfinite(distances[i, j])]
    for size in range(1, n // 2 + 1):
        for chosen in itertools.combinations(edges, size):
            if len({v for edge in chosen for v in edge}) == 2 * size:
                total = sum(float(distances[edge]) for edge in chosen)
                if size > best[0] or total < best[1]:
                    best = (size, total)
    return best


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 6), seed=st.integers(0, 10_000), density=st.floats(0, 1), ties=st.booleans())
def test_the_matching_is_the_best_of_all(n, seed, density, ties):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 3, (n, n)).astype(float) if ties else rng.random((n, n))
    values[rng.random((n, n)) > density] = math.inf
    distances = torch.from_numpy(np.triu(values, 1) + np.triu(values, 1).T)
    distances[torch.isnan(distances)] = math.inf
    distances.fill_diagonal_(math.inf)
    upper = torch.triu(torch.ones(n, n, dtype=torch.bool), 1)
    distances = torch.where(upper | upper.T, torch.from_numpy(np.minimum(values, values.T)), distances)
    groups = [Group((layer,)) for layer in (block(index)[3] for index in range(n))]
    matched = match_groups(groups, distances)
    assert sorted(name for group in names(matched) for name in group) == sorted(g.name for g in groups)
    pairs = [tuple(la.block for la in group.layers) for group in matched if len(group.layers) > 1]
    assert all(len(pair) == 2 and math.isfinite(distances[pair]) for pair in pairs)
    count, total = best_pairing(distances)
    assert len(pairs) == count
    assert sum(float(distances[pair]) for pair in pairs) == pytest.approx(total)


def test_a_limit_leaves_distant_groups_alone():
    groups = form_groups([la for la in model() if la.kind == "o"], "natural")
    distances = torch.full((4, 4), 5.0)
    distances[0, 2] = distances[2, 0] = 1.0
    assert names(match_groups(groups, distances, limit=2.0)) == [
        ["blocks.1.o"],
        ["blocks.0.o", "blocks.2.o"],
        ["blocks.3.o"],
    ]
    assert len(match_groups(groups, distances)) == 2
    with pytest.raises(UsageError, match="shape"):
        match_groups(groups[:3], distances)
    with pytest.raises(UsageError, match="NaN"):
        match_groups(groups, distances * math.nan)


def test_only_groups_of_the_same_kinds_and_width_within_reach_are_candidates():
    layers = model()
    groups = form_groups(layers, "natural")
    distances = pair_distances(groups, *statistics(layers), reach=2)
    assert torch.equal(distances, distances.T)
    for (i, first), (j, second) in itertools.product(enumerate(groups), repeat=2):
        same = i != j and first.kinds == second.kinds and abs(first.last_block - second.last_block) <= 2
        assert math.isfinite(distances[i, j]) == same
    pairs = match_groups(groups, distances)
    assert all(len(group.inputs) == 2 for group in pairs)
    assert all(len({inputs[0].kind for inputs in group.inputs}) == 1 for group in pairs)


@pytest.mark.parametrize("measure", ["subspace", "window"])
def test_twins_have_no_distance_and_are_matched(measure):
    layers = [la for la in model() if la.kind == "o"]
    weights, grams = statistics(layers)
    for twin, other in (("blocks.2.o", "blocks.0.o"), ("blocks.3.o", "blocks.1.o")):
        weights[twin], grams[twin] = weights[other], grams[other]
    groups = form_groups(layers, "natural")
    distances = pair_distances(groups, weights, grams, measure=measure)
    assert distances[0, 2] == pytest.approx(0, abs=1e-6)
    assert distances[0, 1] > 0.05
    assert names(match_groups(groups, distances)) == [["blocks.0.o", "blocks.2.o"], ["blocks.1.o", "blocks.3.o"]]


def test_the_subspace_measure_is_what_a_common_subspace_costs():
    """By hand for one pair: the excess over truncated SVDs, each layer in its own metric."""
    layers = [la for la in model(2) if la.kind == "o"]
    weights, grams = statistics(layers)
    f = {layer.name: torch.linspace(0.5, 3.0, 8, dtype=torch.float64) * (1 + layer.block) for layer in layers}
    found = float(pair_distances(form_groups(layers, "none"), weights, grams, f, rank=0.4)[0, 1])
    W = [weights[la.name] * f[la.name].sqrt() for la in layers]
    G = [grams[la.name].matrix * w.square().mean() for la, w in zip(layers, W, strict=True)]
    W = [w / w.square().mean().sqrt() for w in W]
    L = torch.linalg.cholesky(G[0] + G[1])
    shares = [float(torch.trace(torch.linalg.solve(G[0] + G[1], g))) / 8 for g in G]
    energy = sum(c * (L.T @ w) @ (L.T @ w).T for c, w in zip(shares, W, strict=True))
    basis = torch.linalg.solve(L.T, torch.linalg.eigh(energy).eigenvectors[:, -3:])  # D = L^-T A
    excess = 0.0
    for g, w in zip(G, W, strict=True):
        root = torch.linalg.cholesky(g).T
        best = torch.linalg.lstsq(root @ basis, root @ w).solution
        excess += float((root @ (w - basis @ best)).square().sum())
        excess -= float((torch.linalg.svdvals(root @ w)[3:] ** 2).sum())
    assert found == pytest.approx(excess, rel=1e-9)
    assert found > 0


def test_without_sensitivities_the_scale_of_a_layer_does_not_count():
    layers = [la for la in model(3) if la.kind in "qkv"]
    weights, grams = statistics(layers)
    groups = form_groups(layers, "natural")
    plain = pair_distances(groups, weights, grams)
    scaled = {name: 100 * W if name.startswith("blocks.1") else W for name, W in weights.items()}
    torch.testing.assert_close(pair_distances(groups, scaled, grams), plain)
    louder = {name: Gram(name, 8) for name in grams}
    for name, gram in grams.items():
        louder[name].matrix += (9 if name.startswith("blocks.2") else 1) * gram.matrix
    torch.testing.assert_close(pair_distances(groups, weights, louder), plain)
    f = {la.name: torch.full((la.out_features,), 7.0) for la in layers}
    loss = pair_distances(groups, weights, grams, f)
    torch.testing.assert_close(pair_distances(groups, weights, grams, {n: 2 * v for n, v in f.items()}), 2 * loss)


def test_matching_twice_makes_groups_of_four():
    layers = [la for la in model(4) if la.kind in "qkv"]
    weights, grams = statistics(layers)
    pairs = match_groups(groups := form_groups(layers, "natural"), pair_distances(groups, weights, grams))
    fours = match_groups(pairs, pair_distances(pairs, weights, grams))
    assert [len(group.layers) for group in fours] == [12]
    assert len(fours[0].inputs) == 4


def test_a_silent_input_does_not_break_the_measure():
    layers = [la for la in model(2) if la.kind == "o"]
    weights, grams = statistics(layers)
    grams["blocks.1.o"] = Gram("blocks.1.o", 8)
    weights["blocks.0.o"] = torch.zeros(8, 8)
    assert math.isfinite(pair_distances(form_groups(layers, "none"), weights, grams)[0, 1])


@pytest.mark.parametrize("widths", [(5, 5), (3, 9), (9, 3)])
def test_the_window_distance_tries_all_windows(widths):
    rng = np.random.default_rng(0)
    first, second = (torch.from_numpy(rng.standard_normal((6, n))) for n in widths)
    narrow, wide = (first, second) if widths[0] <= widths[1] else (second, first)
    n = narrow.shape[1]
    expected = min(float((wide[:, k : k + n] - narrow).norm() / narrow.norm()) for k in range(wide.shape[1] - n + 1))
    assert window_distance(first, second) == pytest.approx(expected)
    hidden = torch.cat([wide[:, :1], narrow, wide[:, 1:]], dim=1)
    assert window_distance(narrow, hidden) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"measure": "distance"}, "'subspace' or 'window'"),
        ({"rank": 1.0}, "rank=1.0"),
        ({"measure": "window"}, "has several inputs"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, text):
    layers = [la for la in model() if la.kind == "o"]
    with pytest.raises(UsageError, match=text):
        pair_distances(form_groups(layers, "consecutive:2"), *statistics(layers), **options)
