"""Runs that must end in one clear line and leave nothing that looks like a result."""

import json

import pytest
import torch

from cospadi.errors import CospadiError
from cospadi.pipeline.stages import compress
from cospadi.pipeline.work_folder import WORK
from cospadi.recipe.options import CalibrationConfig, CompressionConfig
from cospadi.recipe.resources import Execution
from tests import helpers
from tests.helpers import VOCABULARY

STREAMED = Execution(max_memory=2**40, threads=1)
WHOLE = Execution(threads=1)
BLOCKS = "model.layers"


class Tokenizer:
    """Gives the bytes of a text, modulo the vocabulary, and counts what it was given."""

    def __init__(self, vocabulary=VOCABULARY):
        self.vocabulary, self.characters = vocabulary, 0

    def __call__(self, text, **options):
        self.characters += len(text)
        return {"input_ids": [byte % self.vocabulary for byte in text.encode()]}

    def save_pretrained(self, folder):
        pass


def recipe(calibration=None, **more):
    more = {"solver": "htp", "solver_options": {"n_iter": 2}, "ratio": 0.3} | more
    more = {"allocation": "uniform", "column_weights": False} | more
    calibration = {"batch_size": 2, "samples": 4, "seq_len": 16} | (calibration or {})
    return CompressionConfig(calibration=CalibrationConfig(**calibration), **more)


def run(model, out, config=None, execution=STREAMED, windows="random", tokenizer=None, **more):
    windows = helpers.token_windows(4, 16) if isinstance(windows, str) else windows
    tokenizer = tokenizer or Tokenizer()
    return compress(model, out, config or recipe(), windows=windows, tokenizer=tokenizer, execution=execution, **more)


def refused(error, words, model, out, config=None, execution=STREAMED, **more):
    """Expect an error of one line with these words, and no more than the records of an unfinished run."""
    before = sorted(out.iterdir()) if out.is_dir() else []
    with pytest.raises(error) as caught:
        run(model, out, config, execution, **more)
    assert isinstance(caught.value, CospadiError)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 900
    for word in words:
        assert word in message
    if out.is_dir():
        assert sorted(path for path in out.iterdir() if path.name != WORK) == [p for p in before if p.name != WORK]
    return message


def nothing_begun(out):
    return not out.exists()


def save(model, folder, dtype=torch.float32, shard="10MB", change=None):
    model = model.to(dtype)
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def edit(folder, name, change):
    path = folder / name
    data = json.loads(path.read_text())
    path.write_text(json.dumps(change(data) or data))
