"""Make a small Llama without a network: its own tokenizer, a few seconds of training where there is a GPU.

    python benchmarks/gpu/small_llama.py OUT --seconds 12

Untrained weights would do for the mechanics, but then any compression looks harmless: with some training the
perplexities before and after say something.
"""

import argparse
import time
from importlib import resources
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    raw.train_from_iterator(text.split("\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", bos_token="<|end|>")


def train(model: LlamaForCausalLM, ids: torch.Tensor, seconds: float, device: torch.device) -> str:
    model.to(device).train()
    ids = ids.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    start, step, loss = time.perf_counter(), 0, torch.zeros(())
    while time.perf_counter() - start < seconds:
        at = torch.randint(0, len(ids) - 257, (32,), device=device)
        window = ids[at[:, None] + torch.arange(256, device=device)]
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=window, labels=window, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0:
            float(loss)  # keep the queue short, so that the time limit holds
    return f"{step} steps, last loss {float(loss):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=12.0, help="of training; none on a CPU")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)
    text = resources.files("cospadi").joinpath("data/calibration.txt").read_text(encoding="utf-8")
    tokenizer = tokenizer_of(text)
    config = LlamaConfig(
        hidden_size=args.hidden,
        num_hidden_layers=args.blocks,
        intermediate_size=args.hidden * 11 // 4,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 128,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    gpu = torch.cuda.is_available()
    if gpu and args.seconds > 0:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        print(train(model, ids, args.seconds, torch.device("cuda")))
    model = model.to("cpu", torch.bfloat16).eval()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out.name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
