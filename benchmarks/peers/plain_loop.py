"""The plain loop of `gpt2_loop.py` over a GPT-2 of the settings' size; prints its tokens per second.

Run as `python plain_loop.py SETTINGS`, with the JSON that `benchmarks/training.py` makes. The feed-forward has two
matrices of four times the width, which is its size with three of 8/3. It evaluates and saves once, at the end.
"""

import json
import sys
import time
from pathlib import Path

import torch
from gpt2_loop import GPT2Style, loss_over, train, windows

from ultrathink_model.data import load_manifest
from ultrathink_model.data.shards import TokenStream


def main() -> None:
    """Trains and prints."""
    settings = json.loads(sys.argv[1])
    torch.manual_seed(0)
    length, sequences = settings["sequence_length"], settings["sequences"]
    model = GPT2Style(
        settings["vocab_size"], length, settings["num_layers"], settings["num_heads"], settings["hidden_size"]
    )
    called = torch.compile(model) if settings["compile"] else model
    manifest = load_manifest(settings["data"])
    streams = {}
    for split in manifest.sources[0].shards:
        stream = TokenStream(manifest.path, manifest.sources[0].shards[split], manifest.token_dtype)
        streams[split] = torch.from_numpy(stream.read(0, min(len(stream), 2_000_000))[0].astype("int64"))
    batches = windows(streams["train"], length, sequences, seed=0)
    train(called, batches, steps=settings["warm_steps"])
    held_out = streams["validation"][: settings["eval_sequences"] * length + 1]
    began = time.perf_counter()
    steps = settings["steps"] - 1 - settings["warm_steps"]
    train(called, batches, steps=steps)
    loss_over(called, held_out, length)
    folder = Path(settings["folder"])
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "model.pt")
    print(steps * sequences * length / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
