"""Stored thresholds, and which backend ``auto`` takes with them."""

import json
import logging

import pytest
import torch

from cospadi.backends import auto, tuning
from cospadi.backends.base import BACKENDS, Placement
from cospadi.backends.cpu.runtime import CpuBackend
from cospadi.errors import UsageError
from cospadi.registry import Availability

CPU = torch.device("cpu")
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of its own for each test; it does not exist yet."""
    BACKENDS.availability("cpu")  # compiles its kernels, once, in the cache that all tests share
    monkeypatch.setenv("COSPADI_CACHE", str(tmp_path / "cache"))
    auto.choose.cache_clear()
    yield tmp_path / "cache"
    auto.choose.cache_clear()


def entry(most=7, dtype=BF16, **changed):
    made = tuning.tuned("cpu", CPU, dtype, {"max_tokens": most})
    return tuning.Tuned(**{**made.__dict__, **changed})


def test_what_is_stored_is_found_for_its_place_only():
    assert tuning.options_for("cpu", CPU, BF16) == {}
    path = tuning.store_tuned([entry(7), entry(9, F32)])
    assert path == tuning.tuning_file()
    assert tuning.options_for("cpu", CPU, BF16) == {"max_tokens": 7}
    assert tuning.options_for("cpu", CPU, F32) == {"max_tokens": 9}
    assert tuning.options_for("cpu", CPU, torch.float16) == {}
    assert tuning.options_for("torch", CPU, BF16) == {}
    assert tuning.options_for("cuda", CPU, BF16) == {}


@pytest.mark.parametrize("changed", [{"device": "Z80"}, {"threads": 77}, {"torch": "0.1"}, {"cospadi": "0.0"}], ids=str)
def test_another_machine_or_version_takes_the_shipped_thresholds(changed):
    tuning.store_tuned([entry(7, **changed)])
    assert len(tuning.stored_tuned()) == 1
    assert tuning.options_for("cpu", CPU, BF16) == {}


def test_threads_are_those_that_torch_has_now():
    tuning.store_tuned([entry(7)])
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert tuning.options_for("cpu", CPU, BF16) == {}
        tuning.store_tuned([entry(8)])
        assert tuning.options_for("cpu", CPU, BF16) == {"max_tokens": 8}
    finally:
        torch.set_num_threads(before)
    assert tuning.options_for("cpu", CPU, BF16) == {"max_tokens": 7}


def test_measuring_again_replaces_and_keeps_the_rest(cache):
    tuning.store_tuned([entry(7), entry(9, F32)])
    tuning.options_for("cpu", CPU, BF16)["max_tokens"] = 99  # its own copy
    assert tuning.options_for("cpu", CPU, BF16) == {"max_tokens": 7}
    tuning.store_tuned([entry(11)])
    assert {one.dtype: one.options["max_tokens"] for one in tuning.stored_tuned()} == {"bfloat16": 11, "float32": 9}
    assert [file.name for file in cache.iterdir()] == ["tuning.json"]


def test_an_interrupted_write_leaves_the_old_file_whole(cache, monkeypatch):
    path = tuning.store_tuned([entry(7)])
    before = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tuning.store_tuned([entry(8)])
    assert path.read_bytes() == before
    assert [file.name for file in cache.iterdir()] == ["tuning.json"]


def test_a_cache_folder_that_cannot_be_written_is_a_usage_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COSPADI_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="COSPADI_CACHE"):
        tuning.store_tuned([entry()])
    assert tuning.options_for("cpu", CPU, BF16) == {}


def test_reset_removes_all():
    assert not tuning.reset_tuned()
    tuning.store_tuned([entry()])
    assert tuning.reset_tuned()
    assert tuning.stored_tuned() == ()
    assert tuning.options_for("cpu", CPU, BF16) == {}


def damaged(change):
    """The text of a file with one valid and one changed entry."""
    good, bad = entry().__dict__, dict(entry(3, F32).__dict__)
    change(bad)
    return json.dumps({"version": 1, "entries": [good, bad]})


DAMAGES = {
    "no text": b"\xff\xfe\x00{",
    "cut": '{"version": 1, "entries": [',
    "list": "[]",
    "other version": '{"version": 2, "entries": []}',
    "entries of another type": '{"version": 1, "entries": 5}',
    "entry of another type": '{"version": 1, "entries": [1]}',
    "missing key": lambda bad: bad.pop("threads"),
    "unknown key": lambda bad: bad.update(more=1),
    "unknown backend": lambda bad: bad.update(backend="abacus"),
    "unknown option": lambda bad: bad.update(options={"speed": 3}),
    "negative": lambda bad: bad.update(options={"max_tokens": -1}),
    "fraction": lambda bad: bad.update(options={"max_tokens": 2.5}),
    "huge": lambda bad: bad.update(options={"max_tokens": 2**40}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_warned_of_once_and_ignored(cache, caplog, damage):
    cache.mkdir()
    content = damaged(damage) if callable(damage) else damage
    tuning.tuning_file().write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert tuning.options_for("cpu", CPU, BF16) == {}
        assert auto.AutoBackend().resolve(Placement(CPU, F32)) is not None
    (record,) = caplog.records
    assert "damaged" in record.getMessage()
    assert "cospadi-cli tune" in record.getMessage()
    tuning.store_tuned([entry(5)])
    assert tuning.options_for("cpu", CPU, BF16) == {"max_tokens": 5}


def test_a_folder_in_the_place_of_the_file_is_no_obstacle_to_running(cache, caplog):
    tuning.tuning_file().mkdir(parents=True)
    assert tuning.options_for("cpu", CPU, BF16) == {}
    assert "cannot be read" in caplog.text


def needs_cpu_kernels():
    state = BACKENDS.availability("cpu")
    if not state:
        pytest.skip(state.reason)


def test_auto_runs_the_chosen_backend_with_what_was_measured():
    needs_cpu_kernels()
    assert auto.AutoBackend().resolve(Placement(CPU, BF16)) == CpuBackend()
    tuning.store_tuned([entry(7)])
    assert auto.AutoBackend().resolve(Placement(CPU, BF16)) == CpuBackend(max_tokens=7)
    assert auto.AutoBackend().resolve(Placement(CPU, F32)) == CpuBackend()
    assert "max_tokens=7 (measured)" in auto.explain("auto", CPU, BF16)
    assert auto.explain("torch", CPU, BF16) == "torch"


def test_auto_says_why_it_takes_no_kernels(monkeypatch):
    name, reason = auto.choose(CPU, torch.float64)
    assert name == "torch"
    assert "float64" in reason
    auto.choose.cache_clear()
    monkeypatch.setattr(CpuBackend, "availability", classmethod(lambda cls: Availability(False, "no compiler")))
    name, reason = auto.choose(CPU, BF16)
    assert name == "torch"
    assert "no compiler" in reason
    name, reason = auto.choose(torch.device("mps"), BF16)
    assert name == "reference"
    assert "mps" in reason


def test_auto_says_why_a_gpu_gets_no_kernels(monkeypatch):
    from cospadi.backends.cuda.runtime import CudaBackend

    monkeypatch.setattr(CudaBackend, "availability", classmethod(lambda cls: Availability(True)))
    old = Availability(False, "the GPU has compute capability 7.5, the kernels need 8.0")
    monkeypatch.setattr(CudaBackend, "supports", lambda *_: old)
    name, reason = auto.choose(torch.device("cuda:1"), BF16)
    assert name == "torch"
    assert "7.5" in reason
    auto.choose.cache_clear()
    monkeypatch.setattr(CudaBackend, "supports", lambda *_: Availability(True))
    assert auto.choose(torch.device("cuda:1"), BF16)[0] == "cuda"


def test_a_gpu_that_torch_does_not_find_is_no_reason_to_fail():
    from cospadi.arrays import cuda_availability

    if cuda_availability():
        pytest.skip("this machine has a GPU")
    name, reason = auto.choose(torch.device("cuda"), BF16)
    assert name == "torch"
    assert "no CUDA GPU" in reason
