"""The built-in measures as the config asks for them, of a finished model or of one that trains."""

from pathlib import Path

from ultrathink_model.config import Config
from ultrathink_model.data.loader import ValidationLoader
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.evaluation.blimp import blimp_metrics
from ultrathink_model.evaluation.context import context_metrics, loss_by_context
from ultrathink_model.evaluation.heldout import score_split
from ultrathink_model.evaluation.result import ContextLoss
from ultrathink_model.models.transformer import Transformer


def measure_context(model: Transformer, manifest: DataManifest, config: Config) -> list[ContextLoss]:
    """Loss by position; empty where `evaluation.context_samples` is 0."""
    settings = config.evaluation
    if not settings.context_samples:
        return []
    length = settings.context_length or config.model.max_seq_length
    return loss_by_context(model, manifest, length, settings.context_samples, settings.batch_size)


def measure_blimp(model: Transformer, tokenizer: Tokenizer, config: Config) -> dict[str, float]:
    """BLiMP's accuracies; empty where `evaluation.blimp` names no folder."""
    settings = config.evaluation
    if settings.blimp is None:
        return {}
    return blimp_metrics(model, tokenizer, Path(settings.blimp), settings.blimp_pairs, settings.batch_size)


def training_metrics(
    model: Transformer, tokenizer: Tokenizer, manifest: DataManifest, config: Config, max_sequences: int | None
) -> dict[str, float]:
    """The measures that `evaluation.training_measures` names.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        manifest: The prepared data.
        config: What is measured.
        max_sequences: Validation sequences that calibration is measured on; None takes all.
    """
    metrics: dict[str, float] = {}
    for measure in config.evaluation.training_measures:
        if measure == "blimp":
            metrics |= measure_blimp(model, tokenizer, config)
        elif measure == "context":
            metrics |= context_metrics(measure_context(model, manifest, config))
        else:
            loader = ValidationLoader(manifest, config, max_sequences=max_sequences)
            metrics |= score_split(model, loader, config.evaluation.calibration_bins).calibration()
    return metrics
