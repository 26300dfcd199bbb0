import json
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.errors import NumericalError, UsageError
from cospadi.evaluation.multiple_choice import Question, choice_log_probabilities, read_questions, score_choices


class Letters:
    """One token per character, except that a space joins the letter after it, as byte-level tokenizers do."""

    eos_token_id = 0

    def __init__(self, begin=(), end=()):
        self.begin, self.end = list(begin), list(end)

    def __call__(self, text):
        ids, i = [], 0
        while i < len(text):
            joined = text[i] == " " and i + 1 < len(text)
            ids.append(ord(text[i + 1]) + 128 if joined else ord(text[i]))
            i += 2 if joined else 1
        return {"input_ids": self.begin + ids + self.end}


class Planted(torch.nn.Module):
    """A causal model whose next-token distribution is a fixed table of the last token alone."""

    def __init__(self, seed=0, nan=False):
        super().__init__()
        self.table = torch.randn(256, 256, generator=torch.Generator().manual_seed(seed))
        self.nan = nan
        self.config = SimpleNamespace(max_position_embeddings=64)
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask, use_cache):
        logits = self.table[input_ids]
        return SimpleNamespace(logits=logits * math.nan if self.nan else logits)

    def plant(self, text, tokenizer, strength=50.0):
        """Make every step of a text nearly certain."""
        ids = tokenizer(text)["input_ids"]
        for before, after in pairwise(ids):
            self.table[before, after] = strength


def expected(model, prompt_ids, choice_ids):
    total, last = 0.0, prompt_ids[-1]
    for token in choice_ids:
        total += float(model.table[last].double().log_softmax(-1)[token])
        last = token
    return total


def test_sums_the_log_probabilities_of_the_choice_alone():
    model, tokenizer = Planted(), Letters()
    scores = choice_log_probabilities(model, tokenizer, Question("abc", ("de", "xyz"), 0))
    for score, choice in zip(scores.tolist(), (" de", " xyz"), strict=True):
        ids = tokenizer(choice)["input_ids"]
        assert score == pytest.approx(expected(model, [ord("c")], ids), rel=1e-5)


def test_a_planted_answer_wins():
    model, tokenizer = Planted(), Letters()
    model.plant("the sky is blue", tokenizer)
    questions = [
        Question("the sky is", ("red", "blue", "made of iron"), 1),
        Question("the sky is", ("red", "blue", "made of iron"), 0),
    ]
    result = score_choices(model, tokenizer, questions)
    assert (result.accuracy, result.accuracy_normalized) == (0.5, 0.5)
    assert result.chance == pytest.approx(1 / 3)


def test_length_normalisation_can_change_the_answer():
    model, tokenizer = Planted(), Letters()
    model.table.zero_()  # every token costs log 256 ...
    model.table[ord("b"), ord("b")] = 20.0  # ... but b after b is free
    question = Question("q", ("a", "bbbbbbbb"), 1)
    scores = choice_log_probabilities(model, tokenizer, question)
    # "q b" and the "b" after the token " b" are paid for, the other six are not.
    assert scores.tolist() == pytest.approx([-math.log(256), -2 * math.log(256)], rel=1e-4)
    result = score_choices(model, tokenizer, [question])
    assert (result.accuracy, result.accuracy_normalized) == (0.0, 1.0)


@pytest.mark.parametrize("prompt", ["abc", "abc\n"])
def test_the_space_at_the_boundary_belongs_to_the_choice(prompt):
    model, tokenizer = Planted(), Letters()
    scores = choice_log_probabilities(model, tokenizer, Question(prompt, (" de", "fg "), 0))
    gap = "\n" if prompt.endswith("\n") else " "
    assert float(scores[0]) == pytest.approx(expected(model, [ord("c")], tokenizer(gap + "de")["input_ids"]), rel=1e-5)


def test_special_tokens_of_the_tokenizer_are_kept_in_front_and_dropped_at_the_end():
    model = Planted()
    plain = choice_log_probabilities(model, Letters(), Question("abc", ("de", "fg"), 0))
    special = choice_log_probabilities(model, Letters(begin=[1], end=[0]), Question("abc", ("de", "fg"), 0))
    torch.testing.assert_close(plain, special)


class Merging(Letters):
    """Also merges "c d" into one token: the boundary lies inside a token of one whole text."""

    def __call__(self, text):
        ids = super().__call__(text)["input_ids"]
        merged, i = [], 0
        while i < len(ids):
            pair = ids[i : i + 2] == [ord("c"), ord("d") + 128]
            merged.append(5 if pair else ids[i])
            i += 2 if pair else 1
        return {"input_ids": merged}


def test_choices_are_scored_from_the_same_token_when_one_merges_with_the_prompt():
    model = Planted()
    scores = choice_log_probabilities(model, Merging(), Question("abc", ("de", "fg"), 0))
    assert float(scores[0]) == pytest.approx(expected(model, [ord("b")], [5, ord("e")]), rel=1e-5)
    ids = [ord("c"), ord("f") + 128, ord("g")]
    assert float(scores[1]) == pytest.approx(expected(model, [ord("b")], ids), rel=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text("abcdef", min_size=1, max_size=6), min_size=2, max_size=5, unique=True), st.randoms())
def test_the_order_of_the_choices_does_not_matter(choices, random):
    model, tokenizer = Planted(), Letters()
    scores = choice_log_probabilities(model, tokenizer, Question("xyz", tuple(choices), 0))
    order = list(range(len(choices)))
    random.shuffle(order)
    again = choice_log_probabilities(model, tokenizer, Question("xyz", tuple(choices[i] for i in order), 0))
    torch.testing.assert_close(again, scores[order])


def test_nan_and_overlong_questions_are_named():
    with pytest.raises(NumericalError, match="NaN"):
        choice_log_probabilities(Planted(nan=True), Letters(), Question("abc", ("d", "e"), 0))
    with pytest.raises(UsageError, match="the model takes 64"):
        choice_log_probabilities(Planted(), Letters(), Question("a" * 70, ("d", "e"), 0))


GOOD = json.dumps({"prompt": "p", "choices": ["a", "b"], "answer": 1})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: not valid JSON"),
        ("[]", "line 3: expected the keys prompt, choices and answer, got list"),
        (GOOD[:-1] + ', "extra": 1}', "line 3: expected the keys"),
        ('{"prompt": " ", "choices": ["a", "b"], "answer": 0}', "line 3: the prompt"),
        ('{"prompt": "p", "choices": ["a"], "answer": 0}', "line 3: choices must be"),
        ('{"prompt": "p", "choices": ["a", ""], "answer": 0}', "line 3: choices must be"),
        ('{"prompt": "p", "choices": ["a", "b"], "answer": 2}', "line 3: answer must be an index from 0 to 1, got 2"),
        ('{"prompt": "p", "choices": ["a", "b"], "answer": true}', "line 3: answer must be"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(UsageError) as error:
        read_questions(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_questions(tmp_path / "absent")
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_questions(tmp_path / "latin")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UsageError, match="empty"):
        read_questions(tmp_path / "empty")


def test_the_embedded_sample_is_well_formed_and_balanced():
    questions = read_questions("embedded")
    assert len(questions) == 40
    assert len({question.prompt for question in questions}) == 40
    positions = [question.answer for question in questions]
    assert {positions.count(i) for i in range(4)} == {10}
