"""How soon a run of ours is as good as others are at their end.

    python benchmarks/time_to_quality.py shakespeare --text input.txt   beside nanoGPT's configuration for a processor
    python benchmarks/time_to_quality.py sotu                           tokens that AdamW needs beside the tiny profile's

On tiny-shakespeare by characters both sides have one thread and the same validation text; clocks stand still while
they evaluate. The text is not part of this project, so without `--text` that half is left out.
"""

import argparse
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import shakespeare
import torch
from peers import gpt2_loop

from ultrathink_model.config import Config, load_config, make_config
from ultrathink_model.data import prepare_data
from ultrathink_model.tracking.metrics import read_metrics
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
PROBE_STEPS = 41

# Tokens of the tiny profile's optimizer, and how many times as many AdamW gets.
SOTU_STEPS, SOTU_FACTOR = 100, 1.5
ADAMW_RATES = (1e-3, 2e-3, 4e-3)


def run_seconds(config: Config) -> float:
    """Seconds that a run trained, from its metrics."""
    seconds, last = 0.0, 0.0
    for row in read_metrics(Path(config.output.output_dir) / "metrics.jsonl"):
        if "train/step_seconds" in row:
            seconds += (row["step"] - last) * row["train/step_seconds"]
            last = row["step"]
    return seconds


def train_ours(folder: Path, text: Path, steps: int) -> tuple[float, float]:
    """Trains on the characters; returns the validation loss and the seconds."""
    data, tokenizer = shakespeare.prepare(text, folder)
    config = make_config(
        {
            "model": OURS["model"],
            "training": {**OURS["training"], "max_steps": steps},
            "data": {"dataset": str(data), "tokenizer_name": str(tokenizer), "cache_dir": str(folder / "cache")},
            "evaluation": {"batch_size": 32, "eval_frequency": 999},
            "logging": {"use_mlflow": False, "log_steps": 20},
            "output": {"output_dir": str(folder / f"steps{steps}")},
        }
    )
    result = train(config, manifest=prepare_data(config), run_name="ours")
    return result.metrics["val/loss"], run_seconds(config)


def train_peer(text: Path) -> list[dict[str, float]]:
    """What nanoGPT's settings come to, every 250 steps."""
    train_text, validation_text = shakespeare.read_splits(text)
    tokenizer = shakespeare.character_tokenizer(train_text + validation_text)
    streams = [torch.tensor(tokenizer.encode(part).ids) for part in (train_text, validation_text)]
    torch.manual_seed(1)
    model = gpt2_loop.GPT2Style(66, PEER_WINDOW, layers=4, heads=4, width=128)
    batches = gpt2_loop.windows(streams[0], PEER_WINDOW, PEER_BATCH, seed=0)
    return gpt2_loop.train(
        model,
        batches,
        steps=PEER_STEPS,
        eval_steps=250,
        evaluate=lambda: gpt2_loop.loss_over(model, streams[1], PEER_WINDOW),
    )


def on_shakespeare(folder: Path, text: Path) -> None:
    """The peer's loss in a third of its time, and what all of its time gives."""
    peer = train_peer(text)
    whole, reached = peer[-1]["seconds"], peer[-1]["val_loss"]
    _, probe_seconds = train_ours(folder, text, PROBE_STEPS)
    step_seconds = probe_seconds / PROBE_STEPS
    print(f"shakespeare: the peer is at {reached:.4f} nats after {whole:.1f} s")
    for name, budget in (("a third of its time", whole / 3), ("its whole time", whole)):
        # A little less: the first steps of a process are slower than those that follow.
        loss, seconds = train_ours(folder, text, int(0.97 * budget / step_seconds))
        print(f"shakespeare: ours in {name}: {loss:.4f} nats after {seconds:.1f} s, ratio {seconds / whole:.3f}")
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
