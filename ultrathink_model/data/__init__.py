"""Data: from any source to exact, validated, memory-mapped batches. Names are loaded when they are first used."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ultrathink_model.data.batch import Batch
    from ultrathink_model.data.loader import (
        TrainLoader,
        ValidationLoader,
        accumulation_steps,
        global_batch_size,
    )
    from ultrathink_model.data.manifest import DataManifest, SourceInfo, SplitInfo, load_manifest
    from ultrathink_model.data.preferences import PreferencePair, Preferences, load_preferences, split_by_prompt
    from ultrathink_model.data.prepare import prepare_data
    from ultrathink_model.data.tokenizer import Tokenizer

_HOMES = {
    "Batch": "batch",
    "DataManifest": "manifest",
    "PreferencePair": "preferences",
    "Preferences": "preferences",
    "SourceInfo": "manifest",
    "SplitInfo": "manifest",
    "Tokenizer": "tokenizer",
    "TrainLoader": "loader",
    "ValidationLoader": "loader",
    "accumulation_steps": "loader",
    "global_batch_size": "loader",
    "load_manifest": "manifest",
    "load_preferences": "preferences",
    "prepare_data": "prepare",
    "split_by_prompt": "preferences",
}

__all__ = [
    "Batch",
    "DataManifest",
    "PreferencePair",
    "Preferences",
    "SourceInfo",
    "SplitInfo",
    "Tokenizer",
    "TrainLoader",
    "ValidationLoader",
    "accumulation_steps",
    "global_batch_size",
    "load_manifest",
    "load_preferences",
    "prepare_data",
    "split_by_prompt",
]


def __getattr__(name: str) -> object:
    # Preparation needs pandera, the loaders need torch: seconds that a process which needs neither should not wait.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
