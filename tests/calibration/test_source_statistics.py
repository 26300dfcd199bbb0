"""The sums of a backward pass: additive, exact on disk, refused when damaged."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from cospadi.calibration.source_statistics import OutputSensitivity, SourceStatistics
from cospadi.errors import CheckpointError, NumericalError


def filled(seed=0, n_tokens=7, **options):
    generator = torch.Generator().manual_seed(seed)
    wanted = {"weighted": True, "note": "a loss", **options}
    statistics = SourceStatistics("b.q", 4, {"b.q": 3, "b.k": 2}, **wanted)
    x = torch.randn(n_tokens, 4, generator=generator, dtype=torch.float64)
    gradients = {n: torch.randn(n_tokens, w, generator=generator, dtype=torch.float64) for n, w in WIDTHS.items()}
    statistics.n_tokens += n_tokens
    statistics.add_inputs(x)
    weights = sum(statistics.layers[name].add(g) for name, g in gradients.items())
    for name in gradients:
        statistics.layers[name].n_tokens += n_tokens
    if statistics._weighted is not None:
        statistics.add_weighted(x, weights)
    return statistics, x, gradients


WIDTHS = {"b.q": 3, "b.k": 2}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_merging_gives_the_moments_of_all_tokens(left_tokens, right_tokens, seed):
    left, x1, g1 = filled(seed, left_tokens)
    right, x2, g2 = filled(seed + 1, right_tokens)
    left.merge(right)
    x, count = torch.cat([x1, x2]), left_tokens + right_tokens
    gradients = {name: torch.cat([g1[name], g2[name]]) for name in WIDTHS}
    weights = sum((g * g).sum(1) for g in gradients.values())
    assert left.n_tokens == left.gram.n_tokens == left.weighted_gram().n_tokens == count
    torch.testing.assert_close(left.gram.matrix, x.T @ x)
    torch.testing.assert_close(left.weighted_gram().matrix, x.T @ (x * (weights / weights.mean())[:, None]))
    for name, g in gradients.items():
        assert left.layers[name].n_tokens == count
        torch.testing.assert_close(left.squares(name), (g * g).mean(0))


@pytest.mark.parametrize(
    "other",
    [{"note": "another loss"}, {"weighted": False}, {"grams": False}],
    ids=lambda other: next(iter(other)),
)
def test_statistics_of_another_kind_do_not_merge(other):
    left, right = filled()[0], filled(**other)[0]
    before = left.squares("b.q").clone()
    with pytest.raises(ValueError, match="cannot merge"):
        left.merge(right)
    assert torch.equal(left.squares("b.q"), before)
    assert left.n_tokens == 7


@pytest.mark.parametrize("options", [{}, {"weighted": False}, {"grams": False, "weighted": False}], ids=len)
def test_save_and_load_are_exact(tmp_path, options):
    statistics, _, _ = filled(**options)
    statistics.save(tmp_path / "s.safetensors")
    again = SourceStatistics.load(tmp_path / "s.safetensors")
    assert (again.name, again.note, again.n_tokens) == ("b.q", "a loss", 7)
    assert again.in_features == 4
    assert list(again.layers) == ["b.q", "b.k"]
    for name, own in statistics.layers.items():
        assert torch.equal(again.squares(name), statistics.squares(name))
        assert again.layers[name].n_tokens == own.n_tokens == 7
    assert (again._weighted is None) == (statistics._weighted is None)
    if statistics.gram is not None:
        assert torch.equal(again.gram.matrix, statistics.gram.matrix)
        assert again.gram.n_tokens == 7
    if statistics._weighted is not None:
        assert torch.equal(again.weighted_gram().matrix, statistics.weighted_gram().matrix)
    again.merge(statistics)
    assert again.n_tokens == 14


def change(path, edit):
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    edit(metadata, tensors)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m, t: t.pop("gram"),
        lambda m, t: t.update(extra=torch.zeros(1)),
        lambda m, t: t.update({"squares/b.k": torch.zeros(2)}),
        lambda m, t: t.update({"squares/b.k": torch.zeros(3, dtype=torch.float64)}),
        lambda m, t: m.update(format="another"),
        lambda m, t: m.update(description="[]"),
        lambda m, t: m.update(counts="{}"),
        lambda m, t: m.update(description=json.dumps({**json.loads(m["description"]), "in_features": -1})),
        lambda m, t: m.clear(),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, edit):
    path = tmp_path / "s.safetensors"
    filled()[0].save(path)
    change(path, edit)
    with pytest.raises(CheckpointError, match="not saved source statistics"):
        SourceStatistics.load(path)


def test_damaged_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    filled()[0].save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="not saved source statistics"):
        SourceStatistics.load(path)
    with pytest.raises(CheckpointError):
        SourceStatistics.load(tmp_path / "missing")


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 1e30])
def test_bad_gradients_stop_with_the_layers_name(bad):
    gradient = torch.ones(4, 3)
    gradient[1, 2] = bad
    with pytest.raises(NumericalError, match=r"model\.layers\.7"):
        OutputSensitivity("model.layers.7", 3).add(gradient)


def test_nothing_collected_is_zero_and_counts_no_tokens():
    empty = SourceStatistics("e", 3, {"e": 2}, weighted=True)
    empty.n_tokens += 10
    assert empty.layers["e"].n_tokens == empty.gram.n_tokens == empty.weighted_gram().n_tokens == 0
    assert not empty.squares("e").any()
    assert not empty.weighted_gram().matrix.any()
    # Tokens came, and the loss does not depend on the layer.
    empty.add_inputs(torch.ones(5, 3))
    assert empty.weighted_gram().n_tokens == 0
