"""A small prepared data set, and a way to train on it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ultrathink_model.config import Config, make_config, override_config
from ultrathink_model.data import DataManifest, prepare_data
from ultrathink_model.tracking.metrics import read_metrics
from ultrathink_model.training.result import StageResult
from ultrathink_model.training.run import train

VALUES = {
    "model": {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 64,
        "max_seq_length": 32,
    },
    "moe": {"num_knowledge_experts": 4, "num_skill_experts": 2, "num_meta_experts": 1, "num_safety_experts": 1},
    "training": {"batch_size": 4, "max_steps": 6, "warmup_steps": 2, "learning_rate": 1e-2},
    "data": {"dataset": "dummy", "tokenizer_name": "train"},
    "evaluation": {"eval_samples": 4},
    "logging": {"use_mlflow": False, "log_steps": 1},
}

Rows = list[dict[str, float]]
TrainTiny = Callable[..., tuple[StageResult, Rows]]


@pytest.fixture(scope="session")
def base_config(tmp_path_factory) -> Config:
    """A dense model of a few thousand weights; runs override its output folder."""
    return make_config(VALUES, [f"data.cache_dir={tmp_path_factory.mktemp('data')}"])


@pytest.fixture(scope="session")
def manifest(base_config) -> DataManifest:
    """The dummy corpus, prepared once for all tests."""
    return prepare_data(base_config)


@pytest.fixture
def train_tiny(base_config, manifest, tmp_path) -> TrainTiny:
    """Trains a run in the test's folder; returns its result and the lines of its metrics."""

    def run(*overrides: str, folder: str = "run", **arguments) -> tuple[StageResult, Rows]:
        output = tmp_path / folder
        config = override_config(base_config, [f"output.output_dir={output}", *overrides])
        result = train(config, manifest=manifest, **{"run_name": "tiny", **arguments})
        return result, read_metrics(Path(output) / "metrics.jsonl")

    return run


def losses(rows: Rows) -> list[float]:
    """The training losses of a run, by step."""
    return [row["train/loss"] for row in rows if "train/loss" in row]
