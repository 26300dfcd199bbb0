"""A deterministic sample of a model's text, to read beside the numbers."""

from typing import Any

import torch

from cospadi.errors import UsageError


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 40) -> str:
    """Continue a prompt greedily; the same model and prompt give the same text.

    Parameters
    ----------
    model : transformers causal language model
        Not changed.
    tokenizer : transformers tokenizer
        Of the model.
    prompt : str
        Continued as plain text, without a chat template.
    max_new_tokens : int
        Longest continuation.

    Returns
    -------
    str
        The continuation without the prompt and without special tokens.

    Raises
    ------
    UsageError
        The prompt has no tokens, or the model cannot generate.
    """
    if not model.can_generate():
        raise UsageError(f"{type(model).__name__} is not a causal language model and cannot generate")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    if ids.shape[-1] == 0:
        raise UsageError("the prompt is empty")
    end = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        # Greedy, whatever the model's generation config says about sampling.
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=end,
    )
    return tokenizer.decode(written[0, ids.shape[-1] :], skip_special_tokens=True)
