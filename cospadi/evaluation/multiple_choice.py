"""Zero-shot multiple choice: the continuation of a prompt that a model finds most likely."""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cospadi.errors import NumericalError, UsageError
from cospadi.evaluation.likelihood import token_nll

EMBEDDED = "embedded"
"""Names the small sample that the package carries."""


@dataclass(frozen=True)
class Question:
    """One item: the prompt, its possible continuations and the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class ChoicesResult:
    """How many questions were answered right.

    Attributes
    ----------
    n_questions : int
        Number of questions.
    accuracy : float
        By the summed log-probability of the choice (``acc`` of lm-eval).
    accuracy_normalized : float
        By the log-probability per character of the choice (``acc_norm`` of lm-eval).
    chance : float
        Expected accuracy of guessing.
    """

    n_questions: int
    accuracy: float
    accuracy_normalized: float
    chance: float


def read_questions(source: str | Path) -> list[Question]:
    """Read questions from JSON lines ``{"prompt": str, "choices": [str, ...], "answer": index}``.

    Parameters
    ----------
    source : str or Path
        A UTF-8 file, or ``embedded`` for the package's own sample.

    Raises
    ------
    UsageError
        The file cannot be read, or a line is not a question; the text names the line.
    """
    try:
        if str(source) == EMBEDDED:
            text = (resources.files("cospadi") / "data" / "choices.jsonl").read_text(encoding="utf-8")
        else:
            text = Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"questions {str(source)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"questions {str(source)!r} is not UTF-8 (byte {error.start})") from error
    questions = [
        _read_question(line, f"{source}, line {number}")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not questions:
        raise UsageError(f"questions {str(source)!r} is empty")
    return questions


def _read_question(line: str, where: str) -> Question:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(item, dict) or set(item) != {"prompt", "choices", "answer"}:
        given = ", ".join(sorted(item)) if isinstance(item, dict) else type(item).__name__
        raise UsageError(f"{where}: expected the keys prompt, choices and answer, got {given or 'none'}")
    prompt, choices, answer = item["prompt"], item["choices"], item["answer"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise UsageError(f"{where}: the prompt must be a text that is not empty")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise UsageError(f"{where}: choices must be a list of at least 2 texts that are not empty")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UsageError(f"{where}: answer must be an index from 0 to {len(choices) - 1}, got {answer!r}")
    return Question(prompt, tuple(choices), answer)


def score_choices(model: Any, tokenizer: Any, questions: list[Question]) -> ChoicesResult:
    """Answer every question by the most likely choice.

    Parameters
    ----------
    model : transformers causal language model
        Not changed.
    tokenizer : transformers tokenizer
        Of the model; it adds a leading special token if it does so by default.
    questions : list of Question

    Returns
    -------
    ChoicesResult

    Raises
    ------
    NumericalError
        A log-probability is NaN.
    UsageError
        A question is longer than the model's context.
    """
    right = right_normalized = 0
    for question in questions:
        scores = choice_log_probabilities(model, tokenizer, question)
        lengths = torch.tensor([len(choice.strip()) for choice in question.choices], dtype=scores.dtype)
        right += int(scores.argmax()) == question.answer
        right_normalized += int((scores / lengths).argmax()) == question.answer
    n = len(questions)
    chance = sum(1 / len(question.choices) for question in questions) / n
    return ChoicesResult(n, right / n, right_normalized / n, chance)


@torch.no_grad()
def choice_log_probabilities(model: Any, tokenizer: Any, question: Question) -> Tensor:
    """Give the summed log-probability of each choice after the prompt, shape (n_choices,), float64."""
    rows, start = _encode(tokenizer, question)
    longest = max(len(row) for row in rows)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise UsageError(f"the question {question.prompt[:40]!r}... has {longest} tokens, the model takes {limit}")
    # Padded on the right with any token: a causal model cannot see what follows, and the mask keeps it out anyway.
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    nll = token_nll(logits[:, start - 1 : -1], ids[:, start:])
    scores = -(nll.double() * mask[:, start:]).sum(dim=1).cpu()
    if bool(scores.isnan().any()):
        raise NumericalError(f"the model's log-probabilities are NaN for the question {question.prompt[:40]!r}...")
    return scores


def _encode(tokenizer: Any, question: Question) -> tuple[list[list[int]], int]:
    """Give the tokens of prompt + choice for each choice, and where their scored part starts.

    Prompt and choice are tokenised together, since tokens may span the boundary; a prompt tokenised alone would force
    a break that the model never saw.  The space between them belongs to the choice.  What is scored starts, for all
    choices alike, after the tokens that the prompt alone and all whole texts share.
    """
    prompt = question.prompt.rstrip()
    gap = question.prompt[len(prompt) :] or " "
    alone = _tokens(tokenizer, prompt)
    rows = [_tokens(tokenizer, prompt + gap + choice.strip()) for choice in question.choices]
    shared = min(_common_prefix(alone, row) for row in rows)
    # Two choices of which one continues the other ("in", "into") may share all tokens but the last ones.
    shared = min([shared, *(len(row) - 1 for row in rows)])
    return rows, max(shared, 1)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokenise as the tokenizer does by default, but without an end-of-text token: the text goes on."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _common_prefix(a: list[int], b: list[int]) -> int:
    """Count the leading tokens that agree."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
