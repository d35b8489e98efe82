"""Which checkpoints of a run are kept."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from ultrathink_model.config.training import TrainingConfig
from ultrathink_model.training.checkpoint import MANIFEST, CheckpointManifest, drop_checkpoints

Checkpoints = Sequence[tuple[int, Path]]


def prune(checkpoints: Checkpoints, training: TrainingConfig) -> None:
    """Deletes the checkpoints that no rule of the config keeps; rank 0 alone calls it.

    The last `keep_checkpoints` stay, the `keep_best` lowest in `best_metric`, and those whose step is a multiple of
    `keep_every`.

    Args:
        checkpoints: Steps and folders.
        training: Section `training` of the config.
    """
    newest = {step for step, _ in sorted(checkpoints)[-training.keep_checkpoints :]}
    best = _best_steps(checkpoints, training) if training.keep_best else set()
    every = training.keep_every
    drop_checkpoints(
        (step, folder)
        for step, folder in checkpoints
        if step not in newest | best and not (every is not None and step % every == 0)
    )


def _best_steps(checkpoints: Checkpoints, training: TrainingConfig) -> set[int]:
    """Steps of the lowest figures; of two equal ones the later."""
    figures = []
    for step, folder in checkpoints:
        try:
            metrics = CheckpointManifest.model_validate_json((folder / MANIFEST).read_bytes()).metrics
        except (OSError, ValidationError):
            continue  # a damaged one is the business of the next resume, which names it
        if training.best_metric in metrics:
            figures.append((metrics[training.best_metric], -step))
    return {-step for _, step in sorted(figures)[: training.keep_best]}
