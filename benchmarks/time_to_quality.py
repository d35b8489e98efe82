"""How soon a run of ours is as good as others are at their end.

    python benchmarks/time_to_quality.py shakespeare --text input.txt   beside nanoGPT's configuration for a processor
    python benchmarks/time_to_quality.py sotu                           tokens that AdamW needs beside the tiny profile's

On tiny-shakespeare by characters both sides have one thread and the same validation text. The text is not part of this project, so without `--text` that half is left out.
"""

import argparse
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shakespeare
import torch
from peers import gpt2_loop
from peers.turns import LoopSteps, Step, alternate, ratio
from training import whole_loop

from ultrathink_model.config import Config, load_config, make_config
from ultrathink_model.data import prepare_data
from ultrathink_model.training.run import train

ROOT = Path(__file__).resolve().parents[1]

# nanoGPT's settings for a processor: 4 layers and heads, width 128, 12 windows of 64 characters, 2,000 steps.
PEER_STEPS, PEER_WINDOW, PEER_BATCH = 2000, 64, 12
PEER_TARGET = 1.88
FIVE_GRAM = 1.669

OURS: dict[str, Any] = {
    "model": {"vocab_size": 66, "hidden_size": 128, "num_layers": 4, "num_heads": 4, "max_seq_length": 128},
    "training": {
        "batch_size": 16,
        "optimizer": "muon",
        "learning_rate": 3e-3,
        "muon_learning_rate": 0.03,
        "schedule": "wsd",
        "decay_fraction": 0.6,
        "min_lr_ratio": 0.02,
        "warmup_steps": 10,
        "num_epochs": 99,
    },
}
PAIRED_ROUNDS = 40

# Tokens of the tiny profile's optimizer, and how many times as many AdamW gets.
SOTU_STEPS, SOTU_FACTOR = 100, 1.5
ADAMW_RATES = (1e-3, 2e-3, 4e-3)


def our_config(folder: Path, text: Path, steps: int) -> Config:
    """A run of ours on the characters."""
    data, tokenizer = shakespeare.prepare(text, folder)
    return make_config(
        {
            "model": OURS["model"],
            "training": {**OURS["training"], "max_steps": steps},
            "data": {"dataset": str(data), "tokenizer_name": str(tokenizer), "cache_dir": str(folder / "cache")},
            "evaluation": {"batch_size": 32, "eval_frequency": 999},
            "logging": {"use_mlflow": False, "log_steps": 50},
            "output": {"output_dir": str(folder / f"steps{steps}")},
        }
    )


class Peer:
    """nanoGPT's settings on the characters."""

    def __init__(self, text: Path) -> None:
        train_text, validation_text = shakespeare.read_splits(text)
        tokenizer = shakespeare.character_tokenizer(train_text + validation_text)
        self._train, self._validation = (
            torch.tensor(tokenizer.encode(part).ids) for part in (train_text, validation_text)
        )
        torch.manual_seed(1)
        self._model = gpt2_loop.GPT2Style(66, PEER_WINDOW, layers=4, heads=4, width=128)

    def train(self, steps: int, pass_on: Callable[[], None] | None = None) -> float:
        """Trains; returns the loss over the whole validation text."""
        batches = gpt2_loop.windows(self._train, PEER_WINDOW, PEER_BATCH, seed=0)
        gpt2_loop.train(self._model, batches, steps=steps, pass_on=pass_on)
        return gpt2_loop.loss_over(self._model, self._validation, PEER_WINDOW)


def step_ratio(folder: Path, text: Path) -> float:
    """The time of a step of ours, with the whole loop around it, in steps of the peer's, taken by turns."""
    config = our_config(folder, text, steps=9999)
    sides: dict[str, Step] = {
        "ours": whole_loop(config, prepare_data(config)),
        "peer": LoopSteps(lambda pass_on: Peer(text).train(9999, pass_on)),
    }
    seconds = alternate(sides, PAIRED_ROUNDS)
    return ratio(seconds["ours"], seconds["peer"])


def on_shakespeare(folder: Path, text: Path) -> None:
    """The peer's loss in a third of its time, and what all of its time gives.

    Times are counted in steps of the peer's: losses do not depend on what else the machine does, and how long a step
    takes beside another is measured by turns.
    """
    one_of_ours = step_ratio(folder, text)
    print(f"shakespeare: a step of ours takes as long as {one_of_ours:.2f} of the peer's", flush=True)
    for name, share in (("a third of the peer's time", 1 / 3), ("the peer's whole time", 1.0)):
        steps = int(share * PEER_STEPS / one_of_ours)
        config = our_config(folder, text, steps)
        loss = train(config, manifest=prepare_data(config), run_name="ours").metrics["val/loss"]
        print(f"shakespeare: ours in {name}, {steps} steps: {loss:.4f} nats", flush=True)
    print(f"shakespeare: the peer after {PEER_STEPS} steps: {Peer(text).train(PEER_STEPS):.4f} nats")
    print(
        f"shakespeare: to be reached: {PEER_TARGET} in a third of the time, {FIVE_GRAM} (a 5-gram model) in all of it"
    )


def on_sotu(folder: Path) -> None:
    """The tiny profile's optimizer beside AdamW with more tokens and the best of several rates."""
    losses = {}
    for name, steps, overrides in (
        ("the default", SOTU_STEPS, []),
        *(
            (
                f"AdamW at {rate:g}",
                int(SOTU_FACTOR * SOTU_STEPS),
                ["training.optimizer=adamw", f"training.learning_rate={rate}"],
            )
            for rate in ADAMW_RATES
        ),
    ):
        output = folder / "sotu"
        shutil.rmtree(output, ignore_errors=True)
        config = load_config(
            ROOT / "configs" / "train_tiny.yaml",
            [
                "logging.use_mlflow=false",
                f"output.output_dir={output}",
                f"data.cache_dir={folder / 'data'}",
                "data.train_samples=3000",
                # Three speeches: the last validation takes them all.
                "data.validation_every=60",
                f"training.max_steps={steps}",
                *overrides,
            ],
        )
        result = train(config, manifest=prepare_data(config), run_name="sotu")
        losses[name] = result.metrics["val/loss"]
        print(f"sotu: {name:16} {result.tokens:7d} tokens: {losses[name]:.4f} nats per token")
    best = min(loss for name, loss in losses.items() if name != "the default")
    verdict = "more" if best > losses["the default"] else "less"
    print(f"sotu: AdamW needs {verdict} than {SOTU_FACTOR} times the default's tokens for {losses['the default']:.4f}")


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("shakespeare", "sotu"))
    parser.add_argument("--text", type=Path, help="input.txt of tiny-shakespeare")
    arguments = parser.parse_args()
    if arguments.part == "shakespeare" and arguments.text is None:
        parser.error("shakespeare needs --text FILE")
    logging.getLogger("ultrathink_model").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="ultrathink-bench-"))
    try:
        if arguments.part != "sotu" and arguments.text is not None:
            on_shakespeare(folder, arguments.text)
        if arguments.part != "shakespeare":
            on_sotu(folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
