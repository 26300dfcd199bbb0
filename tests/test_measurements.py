"""Statistics and texts that one run leaves for another."""

import pytest
import torch

from cospadi.calibration.gradients import SourceStatistics
from cospadi.errors import CheckpointError
from cospadi.measurements import Measurements, digest

FACTS = {"model": "a", "seed": 0, "labels": None}


def statistics(name="model.layers.0.q_proj", seed=0):
    found = SourceStatistics(name, 4, {name: 3, f"{name}.other": 2}, weighted=True, note="how")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 4, generator=generator)
    found.add_inputs(x)
    per_token = sum(
        layer.add(torch.randn(7, layer.squares.shape[0], generator=generator)) for layer in found.layers.values()
    )
    for layer in found.layers.values():
        layer.n_tokens = 7
    found.add_weighted(x, per_token)
    found.n_tokens = 9
    return found


def same(a, b):
    return (
        a.name == b.name
        and a.note == b.note
        and (a.n_tokens, a.gram.n_tokens) == (b.n_tokens, b.gram.n_tokens)
        and torch.equal(a.gram.matrix, b.gram.matrix)
        and torch.equal(a.weighted_gram().matrix, b.weighted_gram().matrix)
        and set(a.layers) == set(b.layers)
        and all(torch.equal(a.layers[n].squares, b.layers[n].squares) for n in a.layers)
        and all(a.layers[n].n_tokens == b.layers[n].n_tokens for n in a.layers)
    )


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_statistics_survive_exactly_and_so_do_their_names(tmp_path):
    kept = Measurements(tmp_path / "cache", FACTS)
    assert (len(kept), list(kept)) == (0, [])
    first, second = statistics("model.layers.0.q_proj"), statistics("h.10.mlp.c_fc", 1)
    kept.store(first)
    kept.store(second)
    for measurements in (kept, Measurements(tmp_path / "cache", dict(reversed(FACTS.items())))):
        assert sorted(measurements) == ["h.10.mlp.c_fc", "model.layers.0.q_proj"]
        assert len(measurements) == 2
        assert first.name in measurements
        for own in (first, second, first):
            assert same(measurements[own.name], own)
            assert not same(measurements[own.name], second if own is first else first)
    assert measurements.facts == FACTS


def test_what_is_stored_again_is_what_is_read(tmp_path):
    kept = Measurements(tmp_path, FACTS)
    kept.store(statistics())
    assert same(kept[statistics().name], statistics())
    kept.store(statistics(seed=5))
    assert same(kept[statistics().name], statistics(seed=5))


def test_what_is_missing_is_a_key_error(tmp_path):
    kept = Measurements(tmp_path, FACTS)
    for key in ("model.layers.0.q_proj", "", "..", 3, None):
        assert key not in kept
    with pytest.raises(KeyError, match="q_proj"):
        kept["q_proj"]
    assert kept.get("q_proj") is None


def test_other_facts_have_a_folder_of_their_own(tmp_path):
    kept = Measurements(tmp_path, FACTS)
    kept.store(statistics())
    for change in ({"model": "b"}, {"seed": 1}, {"labels": "text"}, {"more": None}):
        other = Measurements(tmp_path, FACTS | change)
        assert statistics().name not in other
        assert len(other) == 0
        other.store(statistics(seed=2))
    assert same(Measurements(tmp_path, FACTS)[statistics().name], statistics())
    assert len(list(tmp_path.iterdir())) == 5


def test_the_digest_is_of_the_facts_and_not_of_their_order():
    assert digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1})
    distinct = [{"a": 1}, {"a": "1"}, {"a": None}, {"a": 1.5}, {"b": 1}, {}, {"a": {"b": 1}}]
    assert len({digest(facts) for facts in distinct}) == len(distinct)


@pytest.mark.parametrize("damage", ["empty", "half", "noise", "another kind"])
def test_a_damaged_file_is_named(tmp_path, damage):
    kept = Measurements(tmp_path, FACTS)
    kept.store(statistics())
    (path,) = files(tmp_path)
    data = path.read_bytes()
    if damage == "another kind":
        statistics().gram.save(path)
    else:
        path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "noise": bytes(200)}[damage])
    fresh = Measurements(tmp_path, FACTS)
    with pytest.raises(CheckpointError, match=r"q_proj\.safetensors: not saved source statistics"):
        fresh[statistics().name]


@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_an_interrupted_write_leaves_nothing_that_counts(tmp_path, monkeypatch, when):
    save = SourceStatistics.save

    def stop(self, path):
        if when != "before":
            save(self, path)
        if when == "within":
            path.write_bytes(path.read_bytes()[:100])
        raise KeyboardInterrupt

    kept = Measurements(tmp_path, FACTS)
    kept.store(statistics("old"))
    with monkeypatch.context() as patch:
        patch.setattr(SourceStatistics, "save", stop)
        for name in ("new", "old"):
            with pytest.raises(KeyboardInterrupt):
                kept.store(statistics(name, seed=3))
    for measurements in (kept, Measurements(tmp_path, FACTS)):
        assert list(measurements) == ["old"]
        assert "new" not in measurements
        assert same(measurements["old"], statistics("old"))
    # And the next run writes over whatever lay about.
    kept.store(statistics("new", seed=3))
    assert same(kept["new"], statistics("new", seed=3))


def test_texts_survive_by_name_and_facts(tmp_path):
    kept = Measurements(tmp_path, FACTS)
    assert kept.text("a", {"x": 1}) is None
    kept.keep_text("a", {"x": 1}, "first ä\n")
    kept.keep_text("a", {"x": 2}, "second")
    kept.keep_text("model.layers.0-2", {"x": 1}, "third")
    for measurements in (kept, Measurements(tmp_path, FACTS)):
        assert measurements.text("a", {"x": 1}) == "first ä\n"
        assert measurements.text("a", {"x": 2}) == "second"
        assert measurements.text("model.layers.0-2", {"x": 1}) == "third"
        assert measurements.text("b", {"x": 1}) is None
        assert measurements.text("a", {"x": 3}) is None
    assert Measurements(tmp_path, {**FACTS, "seed": 1}).text("a", {"x": 1}) is None
    # Texts are no statistics.
    assert list(kept) == []
    kept.keep_text("a", {"x": 1}, "anew")
    assert kept.text("a", {"x": 1}) == "anew"
    assert not [path for path in files(tmp_path) if path.suffix == ".tmp"]


def test_a_text_that_cannot_be_read_is_named(tmp_path):
    kept = Measurements(tmp_path, FACTS)
    kept.keep_text("a", {}, "text")
    (path,) = files(tmp_path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CheckpointError, match=r"a\.json: cannot be read .*: delete it"):
        kept.text("a", {})
