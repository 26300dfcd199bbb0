"""Tiny random models of every supported architecture, and token windows for them."""

import torch
import transformers as tf
from torch import Tensor

VOCABULARY = 96

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GQA = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

ARCHITECTURES = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GQA, **_ENDS)),
    "llama-tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GQA, **_ENDS, tie_word_embeddings=True)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GQA, **_ENDS, sliding_window=8)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**{k: v for k, v in _GQA.items() if k != "head_dim"}, **_ENDS)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GQA, **_ENDS)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_GQA, **_ENDS, sliding_window=8)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**{**_GQA, "num_hidden_layers": 3}, **_ENDS, sliding_window=8, sliding_window_pattern=2)
    ),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**_COMMON, **_ENDS)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_COMMON, num_key_value_heads=2, **_ENDS)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        )
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            **_ENDS,
        )
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**_GQA, **_ENDS, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    ),
    "qwen3-moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**_GQA, **_ENDS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    ),
    "bert": lambda: tf.BertModel(tf.BertConfig(**_COMMON, type_vocab_size=2)),
}


def tiny_model(architecture: str, seed: int = 0) -> tf.PreTrainedModel:
    """A tiny random model in evaluation mode; the same numbers for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ARCHITECTURES[architecture]().eval()


def token_windows(n_windows: int = 6, seq_len: int = 24, seed: int = 0) -> Tensor:
    """Random tokens, shape (n_windows, seq_len)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (n_windows, seq_len), generator=generator)


def outputs(model: torch.nn.Module, windows: Tensor) -> Tensor:
    """Logits, or the hidden states of an encoder."""
    with torch.no_grad():
        result = model(input_ids=windows)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state
