"""Greedy decoding by a plain loop, the same for every model."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cospadi.errors import UsageError


def random_prompt(models: Sequence[Any], prompt_tokens: int, new_tokens: int, seed: int = 0) -> Tensor:
    """Give random tokens of a vocabulary that all models share, shape (1, prompt_tokens), on the first one's device.

    Parameters
    ----------
    models : sequence of transformers models
    prompt_tokens, new_tokens : int
        Lengths of the prompt and of its continuation.
    seed : int

    Raises
    ------
    UsageError
        A model cannot generate, or prompt and continuation exceed its context.
    """
    wanted = prompt_tokens + new_tokens
    for model in models:
        if not model.can_generate():
            raise UsageError(f"{type(model).__name__} is not a causal language model: there is nothing to decode")
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and wanted > limit:
            raise UsageError(f"{wanted} tokens of prompt and continuation exceed the model's context of {limit}")
    vocabulary = min(model.get_input_embeddings().num_embeddings for model in models)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (1, prompt_tokens), generator=generator).to(models[0].device)


class Run:
    """One greedy run of a model.

    Parameters
    ----------
    model : transformers causal language model
    ids : Tensor, shape (1, n_tokens)
        The prompt, on the model's device.

    Attributes
    ----------
    first_logits : Tensor, shape (1, vocabulary)
        After the prompt; set by ``prefill``.
    """

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model = model
        self.ids = ids
        self.first_logits = torch.empty(0)
        self._past: Any = None
        self._token = ids
        # By default a model computes the logits of the whole prompt, of which generation needs the last row.
        known = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def prefill(self) -> None:
        """Read the prompt and choose the first token."""
        self._past = None
        self.first_logits = self._step(self.ids)

    def decode(self, n_tokens: int) -> None:
        """Generate tokens, one by one."""
        for _ in range(n_tokens):
            self._step(self._token)

    @torch.no_grad()
    def _step(self, ids: Tensor) -> Tensor:
        out = self.model(input_ids=ids, past_key_values=self._past, use_cache=True, **self._last_only)
        self._past = out.past_key_values
        logits = out.logits[:, -1]
        self._token = logits.argmax(dim=-1, keepdim=True)
        return logits
