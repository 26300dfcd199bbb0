"""Activations that wait in memory or on disk, and walks that use them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.calibration.activations import ActivationCache
from cospadi.calibration.collectors import GramCollector
from cospadi.calibration.lockstep import Lockstep, forward_call
from cospadi.files.durable import StorageError
from cospadi.models.experts import split_experts
from cospadi.models.layers import map_model
from tests.calibration.toys import collect_statistics
from tests.helpers import tiny_model, token_windows

CPU = torch.device("cpu")


@given(
    st.lists(st.sampled_from([(3, 4), (1,), (2, 5, 3), (0, 4)]), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 400),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_is_held_comes_back_and_the_budget_is_kept(tmp_path_factory, shapes, dtype, limit, swap):
    folder = tmp_path_factory.mktemp("held")
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    copies = [tensor.clone() for tensor in tensors]
    with ActivationCache(limit, folder / "waiting") as cache:
        held = [cache.hold(tensor, swap) for tensor in tensors]
        assert cache.resident_bytes <= limit
        for one, tensor, copy in zip(held, tensors, copies, strict=True):
            assert torch.equal(cache.get(one), copy)
            if swap:
                cache.put_back(one)
            assert torch.equal(tensor, copy)
            cache.drop(one)
        assert cache.resident_bytes == 0
        assert not list((folder / "waiting").iterdir())
    assert not (folder / "waiting").exists()


def test_a_view_comes_back_with_its_strides(tmp_path):
    whole = torch.arange(60.0).reshape(5, 12)
    view = whole[1:4, ::2].T
    copy = view.clone()
    with ActivationCache(0, tmp_path / "waiting") as cache:
        back = cache.get(cache.hold(view))
    assert torch.equal(back, copy)
    assert back.stride() == view.stride()


def test_what_an_interrupted_walk_left_is_removed(tmp_path):
    (tmp_path / "00000001.bin").write_bytes(b"old")
    with ActivationCache(10, tmp_path):
        assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full (Linux)")
def test_a_full_disk_is_one_line(tmp_path):
    with ActivationCache(0, tmp_path / "waiting") as cache:
        (tmp_path / "waiting" / "00000000.bin").symlink_to("/dev/full")
        with pytest.raises(StorageError, match=r"00000000\.bin cannot be written .*--resume") as caught:
            cache.hold(torch.ones(100_000))
    assert "\n" not in str(caught.value)


def test_a_tensor_that_is_changed_while_it_is_kept_is_noticed():
    cache = ActivationCache()
    tensor = torch.zeros(3)
    held = cache.hold(tensor)
    tensor += 1
    with pytest.raises(RuntimeError, match="in place"):
        cache.get(held)


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "gemma3", "qwen3-moe", "bert"])
def test_walks_give_the_same_bits_whatever_waits_on_disk(tmp_path, architecture):
    model, windows = tiny_model(architecture), token_windows(5, 12)
    split_experts(model)
    call = forward_call(model, CPU)
    mapped = map_model(model, lambda: call(windows[:1]))
    expected = collect_statistics(model, mapped, call, windows, batch_size=2, weighted=True, seed=1)
    for limit in (0, 4000, 20_000):
        with ActivationCache(limit, tmp_path / "waiting") as cache:
            found = collect_statistics(model, mapped, call, windows, batch_size=2, weighted=True, seed=1, cache=cache)
            assert cache.peak_bytes <= limit
            assert cache.spilled_bytes > 0
        assert list(found) == list(expected)
        for source, statistics in expected.items():
            for key, tensor in statistics._tensors().items():
                assert torch.equal(found[source]._tensors()[key], tensor)


def test_a_walk_forwards_gives_the_same_grams_from_disk(tmp_path):
    model, windows = tiny_model("gemma2"), token_windows(5, 12)
    call = forward_call(model, CPU)
    mapped = map_model(model, lambda: call(windows[:1]))
    modules = dict(model.named_modules())
    widths = {layer.source: layer.in_features for layer in mapped.layers}

    def grams(cache):
        blocks = [modules[name] for name in mapped.blocks]
        watched = {name: modules[name] for name in widths}
        with (
            GramCollector(watched, widths) as collector,
            Lockstep(blocks, call, windows.split(2), cache) as walk,
        ):
            for _ in blocks:
                walk.advance()
        return collector.statistics

    expected = grams(None)
    with ActivationCache(0, tmp_path / "waiting") as cache:
        found = grams(cache)
    for name, gram in expected.items():
        assert torch.equal(found[name].matrix, gram.matrix)
