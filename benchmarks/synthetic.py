"""Write a Llama checkpoint of any size with random weights: real shapes for measurements of memory and time.

    python benchmarks/synthetic.py OUT --blocks 4 --hidden 4096 --intermediate 11008 --heads 32

Singular values decay as in trained models, every matrix has full rank, and activations keep their size from block to
block.  One matrix is in memory at a time.  The same options and versions give the same bytes.
"""

import argparse
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import fft
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cospadi.models import embedded_model
from cospadi.recipe import parse_size

STD = 0.02
"""Standard deviation of the weights, as Llama's are initialised and about as they are trained."""
FLAT = 10
"""Singular value i is proportional to (i + FLAT)^(-1/2): at width 4096 the first is 14 times the middle one."""

Shapes = dict[str, tuple[int, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--tokenizer", type=Path, help="model folder whose tokenizer is copied; default: the embedded")
    parser.add_argument("--vocab", type=int, help="default: that of the tokenizer")
    parser.add_argument("--shard-bytes", type=parse_size, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or embedded_model())
    vocab = args.vocab or len(tokenizer)
    if vocab < len(tokenizer):
        parser.error(f"--vocab {vocab}: the tokenizer has {len(tokenizer)} tokens")
    config = llama_config(args.blocks, args.hidden, args.intermediate, args.heads, args.kv_heads, vocab)
    n_bytes = write_model(args.out, config, tokenizer, args.shard_bytes, args.seed)
    print(f"{args.out}: {n_bytes / 1e9:.3f} GB in {len(list(args.out.glob('*.safetensors')))} shards")


def llama_config(
    blocks: int, hidden: int, intermediate: int, heads: int, kv_heads: int | None, vocab: int
) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=blocks,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        vocab_size=vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )


def write_model(out: Path, config: LlamaConfig, tokenizer: Any, shard_bytes: int, seed: int) -> int:
    """Write the folder of a random model in bfloat16; give the bytes of its tensors."""
    out.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in LlamaForCausalLM(config).state_dict().items()}
    shards = list(divide(shapes, shard_bytes))
    places = dict[str, str]()
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        write_shard(out / file, shard, config.num_hidden_layers, seed)
        places |= dict.fromkeys(shard, file)
    total = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    note = {"metadata": {"total_size": total}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return total


def divide(shapes: Shapes, shard_bytes: int) -> Iterator[Shapes]:
    """Give the tensors of each shard, in the order of the model; one that is larger than a shard is alone."""
    shard, size = Shapes(), 0
    for name, shape in shapes.items():
        n_bytes = 2 * int(np.prod(shape))
        if shard and size + n_bytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += n_bytes
    yield shard


def write_shard(path: Path, shapes: Shapes, blocks: int, seed: int) -> None:
    """Write a safetensors file tensor by tensor; the library's own writer wants all of them in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = torch.from_numpy(values(name, shape, blocks, seed)).to(torch.bfloat16)
            tensor.view(torch.int16).numpy().tofile(file)


def values(name: str, shape: tuple[int, ...], blocks: int, seed: int) -> np.ndarray:
    """Give one tensor in float32; it depends on its name, and not on what was written before it."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    # What each of the 2 * blocks branches adds to the residual stream is made smaller, so that their sum stays.
    std = STD / (2 * blocks) ** 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else STD
    spectrum = (np.arange(min(shape)) + FLAT) ** -0.5
    spectrum *= std * np.prod(shape) ** 0.5 / np.linalg.norm(spectrum)
    return random_matrix(shape, spectrum, np.random.default_rng([seed, zlib.crc32(name.encode())]))


def random_matrix(shape: tuple[int, ...], spectrum: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Give a matrix with these singular values and random singular vectors, float32, without decomposing anything.

    Both sides of diag(spectrum) are multiplied by R C R' C, where C is the cosine transform and R, R' are random signs.
    One round would leave a Toeplitz plus a Hankel matrix.
    """
    matrix = np.zeros(shape, np.float32)
    np.fill_diagonal(matrix, spectrum)
    for axis in (0, 1):
        for _ in range(2):
            matrix = fft.dct(matrix, axis=axis, norm="ortho", overwrite_x=True)
            signs = rng.choice(np.array([-1, 1], np.float32), shape[axis])
            matrix *= signs[:, None] if axis == 0 else signs
    return matrix


if __name__ == "__main__":
    main()
