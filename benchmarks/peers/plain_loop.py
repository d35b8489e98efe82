"""The plain loop of `gpt2_loop.py`, over a GPT-2 or litgpt's Llama of the settings' size; prints each step that it ends.

Run as `python plain_loop.py SETTINGS`, with the JSON that `benchmarks/training.py` makes. The GPT-2's feed-forward has two
matrices of four times the width, which is its size with three of 8/3. It evaluates and saves every so many steps.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
from torch import nn

from peers.gpt2_loop import GPT2Style, loss_over, train, windows
from peers.lit import LitModel
from ultrathink_model.data import load_manifest
from ultrathink_model.data.shards import TokenStream


def main() -> None:
    """Trains."""
    settings = json.loads(sys.argv[1])
    torch.manual_seed(0)
    length, width, vocab = settings["sequence_length"], settings["hidden_size"], settings["vocab_size"]
    layers, heads = settings["num_layers"], settings["num_heads"]
    model: nn.Module
    if settings["model"] == "litgpt":
        model = LitModel(vocab, length, layers, heads, width, settings["intermediate_size"], settings["tie_embeddings"])
    else:
        model = GPT2Style(vocab, length, layers, heads, width)
    called = torch.compile(model) if settings["compile"] else model
    manifest = load_manifest(settings["data"])
    streams = {}
    for split in manifest.sources[0].shards:
        stream = TokenStream(manifest.path, manifest.sources[0].shards[split], manifest.token_dtype)
        streams[split] = torch.from_numpy(stream.read(0, min(len(stream), 2_000_000))[0].astype("int64"))
    held_out = streams["validation"][: settings["eval_sequences"] * length + 1]
    folder = Path(settings["folder"])
    folder.mkdir(parents=True)
    steps = itertools.count(1)

    def after_step() -> None:
        step = next(steps)
        print(f"step {step}/", flush=True)
        if step % settings["save_steps"] == 0:
            loss_over(called, held_out, length)
            torch.save(model.state_dict(), folder / f"{step}.pt")

    batches = windows(streams["train"], length, settings["sequences"], seed=0)
    train(called, batches, steps=settings["steps"], pass_on=after_step)


if __name__ == "__main__":
    main()
