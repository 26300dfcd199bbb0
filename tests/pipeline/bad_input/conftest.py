"""A sound model, which a test may damage."""

import shutil

import pytest

from tests.helpers import tiny_model
from tests.pipeline.bad_input.common import save


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    return save(tiny_model("llama"), tmp_path_factory.mktemp("dense") / "model", shard="30KB")


@pytest.fixture
def folder(saved, tmp_path):
    """A sound model in shards, which a test may damage."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"
