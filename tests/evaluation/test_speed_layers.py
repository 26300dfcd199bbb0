"""Layers, measured and drawn: the arithmetic of times and bytes, on a clock of the tests' own."""

import json

import pytest
import torch

from cospadi.backends.base import BACKENDS, Placement
from cospadi.errors import NumericalError, UnavailableError, UsageError
from cospadi.evaluation.speed import contenders, roofline, single_layers
from cospadi.evaluation.speed.dispatch_overhead import measure_dispatch, sparse_linear
from cospadi.evaluation.speed.random_layers import layer_size, random_inputs, random_layer

CPU = torch.device("cpu")
BF16, F32 = torch.bfloat16, torch.float32


def has_handwritten():
    return contenders.HANDWRITTEN in dict(contenders._dense_products(Placement(CPU, BF16)))


def measured(world, **changed):
    settings = single_layers.LayerSettings(((64, 48),), **{"tokens": (1, 5), "repeats": 3, **changed})
    told = []
    figures = single_layers.measure_layers(settings, told.append, world.clock)
    assert told
    assert json.loads(json.dumps(figures.to_dict(), allow_nan=False)).keys() >= {"rows", "method", "settings"}
    return figures


def test_rows_hold_the_arithmetic_of_times_and_bytes(world, small, priced):
    priced.prices = {contenders.DENSE: 3.0, contenders.HANDWRITTEN: 1.5, "reference": 2.0, "torch": 6.0}
    figures = measured(world, backends=("reference", "torch"))
    size = layer_size((64, 48), 0.3)
    assert [row.n_tokens for row in figures.rows] == sorted(row.n_tokens for row in figures.rows)
    rows = {(row.n_tokens, row.contender): row for row in figures.rows}
    for n_tokens in (1, 5):
        dense, one, slow = (rows[n_tokens, name] for name in (contenders.DENSE, "reference", "torch"))
        assert (dense.microseconds, dense.times_dense, dense.verdict) == (3e6, 1.0, "")
        assert (one.microseconds, one.low, one.high) == (2e6, 2e6, 2e6)
        assert (one.times_dense, slow.times_dense) == (1.5, 0.5)
        assert slow.verdict == "slower than dense"
        assert one.stored_bytes == size.stored_bytes
        assert dense.stored_bytes == 64 * 48 * 2
        assert one.extra_bytes == size.n_atoms * 48 * 2
        assert one.scratch_bytes == n_tokens * size.n_atoms * 2
        assert (dense.extra_bytes, dense.scratch_bytes) == (0, 0)
        assert one.gigabytes_per_second == pytest.approx(size.stored_bytes / 2.0 / 1e9)
        assert one.bandwidth_fraction == pytest.approx(size.stored_bytes / 2.0 / 2e9)
        assert one.product_fraction == pytest.approx(2 * n_tokens * size.n_atoms * (64 + 48) / 2.0 / 4e9)
        assert dense.product_fraction == pytest.approx(2 * n_tokens * 64 * 48 / 3.0 / 4e9)
        assert (one.copies, one.mode, one.dtype) == (2, "eager", "bfloat16")
        assert 0 < one.relative_error < 0.02
        assert 0 < dense.relative_error < 0.02
        if has_handwritten():
            own = rows[n_tokens, contenders.HANDWRITTEN]
            assert own.times_dense == 2.0
            assert one.times_handwritten == 0.75
            assert one.verdict == "slower than own dense"
    assert figures.skipped == []
    assert figures.rates == single_layers.MachineRates(2e9, 1 << 20, {"bfloat16": 4e9})
    assert [one.backend for one in figures.dispatch] == ["reference", "torch"]
    # No time passes between the product and its module on this clock.
    assert [one.overhead for one in figures.dispatch] == [0.0, 0.0]
    settings = figures.to_dict()["settings"]
    assert (settings["dtypes"], settings["device"]) == (["bfloat16"], "cpu")


def test_every_backend_that_can_run_is_measured_and_the_others_have_reasons(world, small, priced):
    figures = measured(world, tokens=(2,), dtypes=(F32, torch.float16))
    for dtype in ("float32", "float16"):
        names = {row.contender for row in figures.rows if row.dtype == dtype} - set(contenders.BASELINES)
        skipped = {one.backend for one in figures.skipped if one.dtype == dtype}
        assert {"reference", "torch"} <= names
        assert names.isdisjoint(skipped)
        assert names | skipped == set(BACKENDS.names()) - {"auto"}
    assert all(one.reason for one in figures.skipped)
    # The yardstick in C exists in bfloat16 only.
    assert not any(row.contender == contenders.HANDWRITTEN for row in figures.rows)
    assert all(row.times_handwritten is None for row in figures.rows)


def test_auto_says_what_it_chose(cache, world, small, priced):
    figures = measured(world, tokens=(1,), backends=("auto",))
    assert list(figures.chosen) == ["auto, bfloat16"]
    assert figures.chosen["auto, bfloat16"].startswith("auto chose ")
    assert "auto" in {row.contender for row in figures.rows}


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_layers_are_measured_for_real(small, dtype):
    """With the machine's clock and all products as they are; each is checked against float64 on the way."""
    settings = single_layers.LayerSettings(
        ((64, 48), (33, 70)), tokens=(1, 5, 40), dtypes=(dtype,), repeats=2, turn_seconds=0.01
    )
    figures = single_layers.measure_layers(settings)
    assert all(row.relative_error < 0.02 for row in figures.rows)
    assert all(0 < row.low <= row.microseconds <= row.high for row in figures.rows)
    assert len({(row.layer, row.n_tokens) for row in figures.rows}) == 6
    names = {row.contender for row in figures.rows}
    assert (contenders.HANDWRITTEN in names) == (dtype == BF16 and has_handwritten())


@pytest.mark.parametrize("value_dtype", ["int8", "bfloat14"])
def test_other_values_are_measured_against_what_they_stand_for(world, small, priced, value_dtype):
    figures = measured(world, tokens=(3,), value_dtype=value_dtype, backends=("reference",))
    (row,) = (row for row in figures.rows if row.contender == "reference")
    assert row.relative_error < 0.02
    assert row.stored_bytes == layer_size((64, 48), 0.3, value_dtype).stored_bytes


@pytest.mark.parametrize("damage", [lambda y: y.fill_(torch.nan), torch.zeros_like])
def test_a_wrong_product_has_no_time(world, small, monkeypatch, damage):
    kind = BACKENDS.get("reference")
    right = kind.multiply
    monkeypatch.setattr(kind, "multiply", lambda *args: damage(right(*args)))
    with pytest.raises(NumericalError, match="reference gives a wrong product for 1 tokens"):
        measured(world, dtypes=(F32,), backends=("reference",))


def test_a_backend_that_was_asked_for_must_run(world, small):
    from cospadi.arrays import cuda_availability

    if not cuda_availability():
        with pytest.raises(UnavailableError, match="'cuda' cannot run here in float32"):
            measured(world, dtypes=(F32,), backends=("cuda",))
    with pytest.raises(UsageError, match="unknown backend"):
        measured(world, dtypes=(F32,), backends=("cudda",))


def test_the_call_of_a_whole_layer_is_measured_beside_its_product(world, monkeypatch):
    from cospadi.backends.sparse_linear import SparseLinear

    forward = SparseLinear.forward

    def slow(self, x):
        world.work(3e-6)
        return forward(self, x)

    kind = BACKENDS.get("torch")
    multiply = kind.multiply
    monkeypatch.setattr(SparseLinear, "forward", slow)
    monkeypatch.setattr(kind, "multiply", lambda *args: (world.work(5e-6), multiply(*args))[1])
    found = measure_dispatch("torch", layer_size((64, 48), 0.3), Placement(CPU, F32), world.clock, repeats=3)
    assert found.multiply == pytest.approx(5.0)
    assert found.module == pytest.approx(8.0)
    assert found.overhead == pytest.approx(3.0)


@pytest.mark.parametrize("value_dtype", ["bfloat16", "bfloat14"])
def test_the_layer_of_the_dispatch_is_the_measured_one(value_dtype):
    layer = random_layer(layer_size((64, 48), 0.3, value_dtype), F32, CPU)
    x = random_inputs(3, 64, F32, CPU)
    with torch.no_grad():
        y = sparse_linear(layer, "reference", CPU)(x)
    expected = layer.expected(x)
    assert float((y.double() - expected).norm() / expected.norm()) < 1e-5


@pytest.fixture
def figures(world, small, priced):
    return measured(world, tokens=(1, 5, 64), ratios=(0.3, 0.5), backends=("reference", "torch"))


def test_the_plot_is_written(figures, tmp_path):
    pytest.importorskip("matplotlib")
    roofline.plot_layers(figures, tmp_path / "roof.svg")
    data = (tmp_path / "roof.svg").read_text()
    for layer in ("64x48 -30%, bfloat16", "64x48 -50%, bfloat16"):
        assert layer in data


def test_the_panels_show_times_and_floors(figures, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: kept.append(self))
    roofline.plot_layers(figures, tmp_path / "unused.png")
    axes = kept[0].get_axes()
    assert len(axes) == 2
    lines = {line.get_label(): line for line in axes[0].get_lines()}
    size = layer_size((64, 48), 0.3)
    assert set(lines["compressed bytes / bandwidth"].get_ydata()) == {size.stored_bytes / 2e9 * 1e6}
    assert set(lines["dense bytes / bandwidth"].get_ydata()) == {64 * 48 * 2 / 2e9 * 1e6}
    assert list(lines["torch"].get_xdata()) == [1, 5, 64]
    assert list(lines["torch"].get_ydata()) == [1e6] * 3


def test_a_plot_that_cannot_be_is_a_usage_error(figures, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match="cannot be written"):
        roofline.plot_layers(figures, tmp_path / "roof.wav")
    monkeypatch.setattr(roofline.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="pip install matplotlib"):
        roofline.plot_layers(figures, tmp_path / "roof.png")
