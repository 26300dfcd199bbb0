"""Runs with one block in memory, with activations in files, and in several processes give the bytes of a plain one."""

import weakref
from dataclasses import replace

import pytest
import torch
import transformers as tf

from cospadi.calibration.activations import ActivationCache
from cospadi.errors import UsageError
from cospadi.events import Calibrated, Predicted
from cospadi.pipeline import stages as pipeline
from cospadi.pipeline.memory_plan import plan_memory
from cospadi.pipeline.stages import compress
from cospadi.pipeline.statistics_store import Measurements
from cospadi.recipe.options import CalibrationConfig, CompressionConfig
from cospadi.recipe.resources import Execution
from tests.helpers import tiny_model, token_windows
from tests.pipeline.test_compress import digests

WINDOWS = token_windows(5, 8)
PLENTY = Execution(max_memory=2**60)
ONE_BATCH = 2 * 8 * 32 * 4
"""Bytes of the hidden states of a batch."""


class NoTokenizer:
    def save_pretrained(self, folder):
        """Write nothing: the folders of these models hold no tokenizer either."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Give a folder that holds the model of an architecture in bfloat16 in several files, and the model loaded."""

    def saved(architecture):
        folder = tmp_path_factory.getbasetemp() / "streaming" / architecture
        if not folder.exists():
            tiny_model(architecture).to(torch.bfloat16).save_pretrained(folder, max_shard_size="30KB")
            assert len(list(folder.glob("*.safetensors"))) > 1
        config = tf.AutoConfig.from_pretrained(folder)
        model = getattr(tf, config.architectures[0]).from_pretrained(folder, dtype="auto")
        model.config._name_or_path = architecture  # the name that the folder has, so that the reports agree
        return folder, model

    return saved


@pytest.fixture
def spilled(monkeypatch):
    """Bytes that each cache of activations wrote to files."""
    found = []
    leave = ActivationCache.__exit__

    def note(cache, *exception):
        found.append(cache.spilled_bytes)
        leave(cache, *exception)

    monkeypatch.setattr(ActivationCache, "__exit__", note)
    return found


def allow(monkeypatch, activations):
    """Let so many bytes of activations wait in memory wherever there is a limit."""

    def plan(*given):
        budget = plan_memory(*given)
        return replace(budget, activations=None if budget.activations is None else activations)

    monkeypatch.setattr(pipeline, "plan_memory", plan)


def recipe(calibration=None, **more):
    """The cheapest solver: what is solved is not what these tests are about."""
    more = {"solver": "svd", "ratio": 0.3, "allocation": "uniform", "column_weights": False} | more
    return CompressionConfig(calibration=CalibrationConfig(**({"batch_size": 2} | (calibration or {}))), **more)


def run(model, out, config, execution=None, **more):
    more = {"windows": WINDOWS, "tokenizer": NoTokenizer()} | more
    return compress(model, out, config, execution=execution, **more)


def check_all_ways(architecture, config, saved, tmp_path, monkeypatch, spilled):
    folder, model = saved(architecture)
    run(folder, tmp_path / "plain", config)
    assert not any(spilled)
    expected = digests(tmp_path / "plain")
    assert {"model.safetensors", "config.json", "report.json"} <= set(expected)
    run(model, tmp_path / "object", config)
    assert digests(tmp_path / "object") == expected
    allow(monkeypatch, ONE_BATCH)
    run(folder, tmp_path / "streamed", config, PLENTY)
    assert any(spilled)
    assert digests(tmp_path / "streamed") == expected


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "opt", "gemma3", "mixtral", "bert"])
def test_every_architecture_gives_the_same_bytes_block_by_block(architecture, saved, tmp_path, monkeypatch, spilled):
    """The one recipe with a way forwards, a way back, and two models in step."""
    config = recipe({"order": "sequential", "mixing": 0.5}, column_weights=True)
    check_all_ways(architecture, config, saved, tmp_path, monkeypatch, spilled)


RECIPES = {
    "grams alone": recipe(),
    "one-shot": recipe(allocation="equal-ratio", storage="quantized", weight_dtypes=("int8",), token_weights=True),
    "sequential without the dense model": recipe({"order": "sequential", "mixing": 0.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama-tied", "qwen3-moe"])
@pytest.mark.parametrize("way", RECIPES)
def test_every_way_of_calibrating_gives_the_same_bytes(way, architecture, saved, tmp_path, monkeypatch, spilled):
    check_all_ways(architecture, RECIPES[way], saved, tmp_path, monkeypatch, spilled)


def test_more_parts_than_windows_are_refused(saved, tmp_path):
    config = recipe({"parts": len(WINDOWS) + 1})
    with pytest.raises(UsageError, match=f"cannot be divided into parts={len(WINDOWS) + 1}"):
        run(saved("llama-tied")[0], tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_groups_that_need_all_weights_are_refused_within_a_limit(saved, tmp_path):
    with pytest.raises(UsageError, match="need all weights at once"):
        run(saved("llama-tied")[0], tmp_path / "out", recipe(groups="matching"), Execution(max_memory=2**40))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sensitive", [False, True])
def test_parts_give_the_same_bytes_block_by_block(sensitive, saved, tmp_path, monkeypatch, spilled):
    config = recipe({"parts": 2}, column_weights=sensitive)
    check_all_ways("gpt2", config, saved, tmp_path, monkeypatch, spilled)


def test_the_least_limit_is_enough_and_is_told(saved, tmp_path, monkeypatch, spilled):
    """With nothing else in the process; as many windows as take more memory than the largest group."""
    folder, _ = saved("llama")
    config, windows, given = recipe(column_weights=True), token_windows(40, 24), []
    monkeypatch.setattr("cospadi.pipeline.memory_plan.resident_bytes", lambda: 0)
    monkeypatch.setattr(pipeline, "plan_memory", lambda *args: given.append(args) or plan_memory(*args))

    def accepts(limit):
        try:
            budget = plan_memory(*given[0][:-1], limit)
        except UsageError:
            return False
        assert budget.activations >= 0
        assert budget.predicted.peak <= limit
        assert budget.predicted.limit == limit
        return True

    events = []
    run(folder, tmp_path / "plenty", config, PLENTY, windows=windows, on_event=events.append)
    (predicted,) = [event for event in events if isinstance(event, Predicted)]
    assert events[0] == predicted
    assert not any(spilled)
    low, high = 0, predicted.peak
    assert accepts(high)
    assert not accepts(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if accepts(middle) else (middle, high)
    assert high < predicted.peak

    events.clear()
    run(folder, tmp_path / "least", config, Execution(max_memory=high), windows=windows, on_event=events.append)
    assert sum(spilled) > 0
    assert digests(tmp_path / "least") == digests(tmp_path / "plenty")
    (predicted,) = [event for event in events if isinstance(event, Predicted)]
    assert predicted.peak <= predicted.limit == high
    with pytest.raises(UsageError) as caught:
        run(folder, tmp_path / "none", config, Execution(max_memory=low), windows=windows)
    assert "is too little: this run needs at least" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "none").exists()


def test_what_waits_in_files_is_gone_however_a_run_ends(saved, tmp_path, monkeypatch, spilled):
    class Stop(Exception):
        pass

    def stop(event):
        if isinstance(event, Calibrated) and event.done == 2:  # the way forwards is done
            assert list((tmp_path / "out").rglob("*.bin"))
            raise Stop

    folder, _ = saved("llama")
    allow(monkeypatch, 0)
    with pytest.raises(Stop):
        run(folder, tmp_path / "out", recipe(column_weights=True), PLENTY, on_event=stop)
    assert any(spilled)
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_two_runs_that_share_a_cache_leave_each_others_files_alone(saved, tmp_path, monkeypatch, spilled):
    """One of them does all its work while the other is in the middle of its calibration."""
    folder, _ = saved("llama")
    config = recipe(column_weights=True)
    run(folder, tmp_path / "plain", config)
    allow(monkeypatch, 0)

    def begin_another(event):
        if isinstance(event, Calibrated) and event.done == 1:
            run(folder, tmp_path / "inner", config, PLENTY, cache=tmp_path / "cache")

    run(folder, tmp_path / "outer", config, PLENTY, cache=tmp_path / "cache", on_event=begin_another)
    assert all(spilled[-2:])
    assert digests(tmp_path / "outer") == digests(tmp_path / "inner") == digests(tmp_path / "plain")
    assert not list((tmp_path / "cache").rglob("*.bin"))


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 2**60])
def test_workers_give_the_same_bytes(limit, saved, tmp_path):
    folder, _ = saved("llama-tied")
    config = recipe({"parts": 2}, allocation="equal-ratio", storage="quantized", weight_dtypes=("int8",))
    run(folder, tmp_path / "alone", config, Execution(threads=1))
    events = []
    several = Execution(workers=2, threads=1, max_memory=limit)
    run(folder, tmp_path / "together", config, several, on_event=events.append)
    assert digests(tmp_path / "together") == digests(tmp_path / "alone")
    assert [event.done for event in events if isinstance(event, Calibrated) and event.done] == [1, 2]


def test_workers_need_a_folder(saved, tmp_path):
    _, model = saved("llama")
    with pytest.raises(UsageError, match="save it, and give its folder instead of an object"):
        run(model, tmp_path / "out", recipe(), Execution(workers=2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("column_weights", [True, False])
def test_sums_are_freed_before_the_next_are_stored(saved, tmp_path, monkeypatch, column_weights):
    folder, _ = saved("llama")
    stored, store = [], Measurements.store

    def watch(self, statistics):
        assert not [one() for one in stored if one() is not None]
        stored.append(weakref.ref(statistics))
        store(self, statistics)

    monkeypatch.setattr(Measurements, "store", watch)
    run(folder, tmp_path / "out", recipe(column_weights=column_weights), PLENTY)
    assert len(stored) == 8  # four inputs in each of two blocks
