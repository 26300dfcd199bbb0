import copy

import pytest
import yaml

from cospadi.recipe.options import CompressionConfig
from cospadi.reporting.model_card import model_card

PERPLEXITY = {"token": 10.0, "word": 30.0, "mean_nll": 2.3, "n_tokens": 62, "n_words": 40, "window": 32}
REPORT = {
    "cospadi": "0.1.0",
    "model": "someone/some-model",
    "causal": True,
    "config": CompressionConfig().to_dict(),
    "format": "bitmask",
    "calibration": {"source": "text.txt", "fingerprint": "ab" * 32, "windows": 4, "seq_len": 32},
    "solver": {"name": "htp", "reason": "named in the recipe"},
    "groups": [
        {"kind": "factors", "members": [{"name": "a", "relative_error": 0.1}, {"name": "b", "relative_error": 0.4}]},
        {"kind": "quantized", "members": [{"name": "c", "relative_error": 0.2}]},
    ],
    "kept_dense": [],
    "totals": {
        "n_layers": 3,
        "layer_bytes": 8_000,
        "layer_dense_bytes": 10_000,
        "ratio": 0.2,
        "ratio_paper_convention": 0.24,
        "model_bytes": 18_000,
        "model_dense_bytes": 20_000,
        "model_ratio": 0.1,
        "mean_relative_error": 0.23,
    },
    "evaluation": {
        "text": "held_out.txt",
        "definition": "token: t; word: w",
        "baseline": {"perplexity": PERPLEXITY},
        "compressed": {"perplexity": {**PERPLEXITY, "token": 12.5}},
        "perplexity_ratio": 1.25,
    },
}


def card_of(**changes):
    return model_card({**copy.deepcopy(REPORT), **changes})


def front_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_names_the_base_model_by_its_id_only():
    front = front_of(card_of())
    assert (front["base_model"], front["base_model_relation"]) == ("someone/some-model", "quantized")
    assert front["library_name"] == "transformers"
    path = card_of(model="/home/me/models/some-model")
    assert "base_model" not in front_of(path)
    assert "/home/me" not in path
    assert "some-model" in path


def test_names_texts_without_the_folders_of_the_machine():
    calibration = {**REPORT["calibration"], "source": "/home/me/text.txt"}
    card = card_of(calibration=calibration, evaluation={**REPORT["evaluation"], "text": "hf:org/held-out"})
    assert "/home/me" not in card
    assert "text.txt" in card
    assert "hf:org/held-out" in card


def test_quotes_the_report():
    card = card_of()
    for text in ("| 10,000 | 8,000 | -20.0% |", "| 20,000 | 18,000 | -10.0% |", "24.0%", "| 10.00 | 12.50 | x1.250 |"):
        assert text in card
    assert "0.4000 at worst (`b`)" in card


def test_says_to_import_cospadi_first_and_how_to_do_without():
    card = card_of()
    assert card.index("import cospadi") < card.index("AutoModelForCausalLM.from_pretrained")
    assert "random values" in card
    assert "cospadi-cli decompress" in card


@pytest.mark.parametrize("baseline", [None, REPORT["evaluation"]["baseline"]])
def test_works_without_a_baseline(baseline):
    evaluation = {**REPORT["evaluation"], "baseline": baseline, "perplexity_ratio": 1.25 if baseline else None}
    assert "12.50" in card_of(evaluation=evaluation)


def test_without_an_evaluation_there_is_no_perplexity():
    card = card_of(evaluation=None)
    assert "perplexity" not in card.lower()


def test_an_encoder_is_no_text_generator():
    card = card_of(evaluation=None, causal=False)
    assert "pipeline_tag" not in front_of(card)
    assert "AutoModel.from_pretrained" in card


def test_dense_coefficients_are_not_called_sparse():
    assert "sparse coefficients" in card_of()
    assert "sparse coefficients" not in card_of(format="dense")
