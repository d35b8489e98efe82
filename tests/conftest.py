"""Fixtures that tests of several packages share."""

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A ZenML of each test process's own, named before ZenML is imported.
os.environ["ZENML_CONFIG_PATH"] = tempfile.mkdtemp(prefix="ultrathink-zenml-")
os.environ["ZENML_ANALYTICS_OPT_IN"] = "false"

import atexit
import logging
import shutil
import sys
from collections.abc import Iterator

import jaxtyping
import pytest
from jaxtyping import install_import_hook

from ultrathink_model.config import Config, make_config

atexit.register(shutil.rmtree, os.environ["ZENML_CONFIG_PATH"], ignore_errors=True)

# Lets the model's own tests check every call of its mathematics against the shapes of its signature; set before it is
# imported. Elsewhere, in the tests that train, the checks are off.
# Generation is left out: a generator function that is wrapped loses its `no_grad`.
CHECKED = (
    "attention", "blocked_attention", "dispatch", "harm_head", "kv_cache", "linear", "loss", "moe", "multimodal",
    "native", "norm", "reasoning", "routing", "swiglu", "tokens", "transformer",
)  # fmt: skip
CHECKS_SHAPES = os.environ.get("ULTRATHINK_CHECK_SHAPES", "1") == "1"
if CHECKS_SHAPES:
    install_import_hook([f"ultrathink_model.models.{module}" for module in CHECKED], "beartype.beartype")
    jaxtyping.config.update("jaxtyping_disable", True)

# ZenML asks where the main module lies, which in a process of pytest-xdist is nowhere.
if not hasattr(sys.modules["__main__"], "__file__"):
    sys.modules["__main__"].__file__ = pytest.__file__

TINY_VALUES = {
    "model": {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 64,
        "max_seq_length": 32,
    },
    "moe": {
        "num_knowledge_experts": 4,
        "num_skill_experts": 2,
        "num_meta_experts": 1,
        "num_safety_experts": 1,
    },
    "training": {"batch_size": 4, "max_steps": 6, "warmup_steps": 2},
    "data": {"dataset": "dummy", "tokenizer_name": "train"},
    "logging": {"use_mlflow": False, "log_steps": 1},
}


@pytest.fixture
def tiny_config(tmp_path) -> Config:
    """A dense model of a few thousand weights that writes into the test's own folder."""
    return make_config(
        TINY_VALUES,
        [f"output.output_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'data'}"],
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves tests that compile to the process that `tests/models/test_shapes.py` starts for them."""
    compiling = [item for item in items if CHECKS_SHAPES and item.get_closest_marker("compiles")]
    if compiling:
        config.hook.pytest_deselected(items=compiling)
        items[:] = [item for item in items if item not in compiling]


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """Gives the package's logger back as it was: command lines that a test runs in this process set it up."""
    logger = logging.getLogger("ultrathink_model")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate
