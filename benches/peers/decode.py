"""Greedy decoding of a small Qwen3-Next in transformers on the CPU: the model of ../configs/decode-small.toml with random weights.

    python benches/peers/decode.py [--batch 1] [--tokens 64] [--context 1 1024 16384] [--dtype f32]

Prints, per length of context, tokens per second of reading the prompt (the best of two, with the logits of its last token alone) and of decoding.
"""
import argparse
import pathlib
import time
import tomllib

import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

CONFIG = pathlib.Path(__file__).resolve().parent.parent / "configs" / "decode-small.toml"


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--context", type=int, nargs="+", default=[1, 1024, 16384])
    options.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    options = options.parse_args()
    torch.manual_seed(0)
    config = tomllib.loads(CONFIG.read_text())["model"]
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**config, pad_token_id=None, bos_token_id=None, eos_token_id=None)).eval()
    model = model.to({"f32": torch.float32, "bf16": torch.bfloat16}[options.dtype])
    with torch.inference_mode():
        for context in options.context:
            ids = torch.randint(0, config["vocab_size"], (options.batch, context))
            best = float("inf")
            for _ in range(2):
                start = time.perf_counter()
                out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
                best = min(best, time.perf_counter() - start)

            def step(out):
                return model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)

            for _ in range(4):
                out = step(out)
            start = time.perf_counter()
            for _ in range(options.tokens):
                out = step(out)
            decode = time.perf_counter() - start
            tokens = options.batch * options.tokens / decode
            print(f"context {context}: prompt {options.batch * context / best:.1f} tokens/s, decode {tokens:.1f} tokens/s", flush=True)


main()
