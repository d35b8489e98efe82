"""The memory that `run.py plan` foretells beside the memory that training takes: peak of the process over its start.

    python benchmarks/planned_memory.py

Each case trains a few steps in a process of its own on the processor, on random tokens. Every tensor gets pages of its
own there, which go back when it is freed: glibc's usual heap has gaps, and takes half as much again.
"""

import argparse
import multiprocessing
import os
import resource

import psutil
import torch

from ultrathink_model.config import Config, load_config, override_config
from ultrathink_model.config.profiles import profile_path
from ultrathink_model.models.transformer import build_model
from ultrathink_model.planning import make_plan
from ultrathink_model.training.optimizer import make_optimizer

# On a processor 16-bit products are emulated, and one micro-step shows the peak of a step.
PLAIN = ["training.use_amp=false", "training.gradient_accumulation_steps=1"]
CASES = {
    "tiny": ("tiny", []),
    "tiny, wide batch": ("tiny", ["training.batch_size=32"]),
    "tiny, adamw": ("tiny", ["training.batch_size=32", "training.optimizer=adamw"]),
    "tiny, checkpointing": ("tiny", ["training.batch_size=32", "model.gradient_checkpointing=true"]),
    "small": ("small", ["model.max_seq_length=512", "training.batch_size=2"]),
    "small, checkpointing": (
        "small",
        ["model.max_seq_length=512", "training.batch_size=2", "model.gradient_checkpointing=true"],
    ),
}
MIB = 2**20
STEPS = 3


def main() -> None:
    """Prints a line a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    for name in parser.parse_args().only:
        profile, overrides = CASES[name]
        config = load_config(profile_path(profile), [*PLAIN, *overrides])
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured = pool.apply(peak_of_training, (config,))
        planned = make_plan(config).memory.total
        print(
            f"{name:24} planned {planned / MIB:8,.0f} MiB, measured {measured / MIB:8,.0f} MiB, {planned / measured:.2f}"
        )


def peak_of_training(config: Config) -> float:
    """Bytes that a few training steps take at their peak over what this process held before them."""
    # What the libraries take for themselves at their first use. Its own weights are gone again: not its peak counts.
    _train(override_config(config, ["model.num_layers=1", "training.batch_size=1", "model.vocab_size=64"]))
    before = psutil.Process().memory_info().rss
    _train(config)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0 - before


def _train(config: Config) -> None:
    model = build_model(config).train()
    optimizer = make_optimizer(config.training, model)
    for step in range(STEPS):
        tokens = torch.randint(0, config.model.vocab_size, (config.training.batch_size, config.model.max_seq_length))
        model.begin_step(step)
        loss = model(tokens, labels=tokens).loss_sum
        assert loss is not None
        (loss / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
