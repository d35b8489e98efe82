"""Runs of the `tiny` profile that benchmarks compare. A run that was cut goes on, and a finished one is read again."""

import logging
from pathlib import Path

from ultrathink_model.config import Config, load_config
from ultrathink_model.data import DataManifest, prepare_data
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training.result import StageResult
from ultrathink_model.training.run import train

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs" / "benchmarks"
# What makes a size of the tiny profile.
SIZES: dict[str, list[str]] = {
    "tiny": [],
    "micro": [
        *("model.hidden_size=128", "model.intermediate_size=352", "model.max_seq_length=128"),
        # Fewer held-out documents: the whole split is read after each run.
        "data.validation_every=40",
    ],
}


def tiny_config(name: str, *overrides: str) -> Config:
    """The tiny profile with `overrides`, writing to the run's own folder."""
    own = (
        f"output.output_dir={FOLDER / name}",
        f"data.cache_dir={ROOT / 'outputs' / 'data'}",
        "data.train_samples=null",
        "logging.use_mlflow=false",
        "training.checkpoint_steps=50",
        "training.keep_checkpoints=1",
    )
    return load_config(ROOT / "configs" / "train_tiny.yaml", [*own, *overrides])


def trained(name: str, *overrides: str, init_from: Path | None = None) -> tuple[StageResult, DataManifest]:
    """Trains the run `name`, or what is left of it.

    Returns:
        Its result, whose `val/loss` is over the whole validation split, and the data it was trained on.
    """
    logging.basicConfig(level=logging.WARNING)
    config = tiny_config(name, *overrides)
    manifest = prepare_data(config)
    return train(config, manifest=manifest, run_name=name, init_from=init_from), manifest


def folder_of(name: str) -> RunFolder:
    """The folder of the run `name`."""
    return RunFolder(FOLDER / name)
