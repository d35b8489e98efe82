"""Greedy generation of ours beside `transformers.generate`, on the same weights: `python benchmarks/generation.py`.

New tokens per second of the shared decoder with a cache, for one prompt and for sixteen, as ratios.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from peers.sizes import our_config
from peers.turns import alternate, ratio
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

from ultrathink_model.models.generation import generate
from ultrathink_model.models.hf import save_model
from ultrathink_model.models.transformer import build_model

PROMPT = 64


def compare(batch: int, new_tokens: int, rounds: int) -> None:
    """Prints the speeds for `batch` prompts, after a check that both say the same."""
    config = our_config("model.initializer_range=0.2")
    ours = build_model(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer"
        tokenizer.mkdir()
        Tokenizer(models.BPE()).save(str(tokenizer / "tokenizer.json"))
        save_model(ours, tokenizer, Path(folder) / "model", config)
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "model").eval()
    prompts = torch.randint(0, config.model.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}

    def their_tokens() -> torch.Tensor:
        with torch.no_grad():
            return theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, PROMPT:]

    def our_tokens() -> torch.Tensor:
        return generate(ours, prompts, max_new_tokens=new_tokens, temperature=0.0).tokens

    same = (our_tokens() == their_tokens()).float().mean()
    # One thread's own time, however busy the machine is with other things.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = alternate({"ours": our_tokens, "theirs": their_tokens}, rounds, warmup=1, clock=clock)
    rates = {name: batch * new_tokens / median(times) for name, times in seconds.items()}
    print(
        f"batch {batch:3}: ultrathink {rates['ours']:8,.0f} tokens/s, transformers {rates['theirs']:8,.0f}; "
        f"{ratio(seconds['theirs'], seconds['ours']):.2f} times as fast; {same:.1%} of the tokens are the same"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads of each product")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens generated after each prompt")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for batch in (1, 16):
        compare(batch, arguments.new_tokens, arguments.rounds)


if __name__ == "__main__":
    main()
