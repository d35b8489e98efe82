"""The baselines' losses, counted once for each prepared data set and kept beside its manifest."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.evaluation.ngram import baseline_losses
from ultrathink_model.evaluation.perplexity import ValidationLoss
from ultrathink_model.evaluation.result import SavedRecord

BASELINES_NAME = "baselines.json"


class _Loss(BaseModel):
    model_config = ConfigDict(frozen=True)

    loss: float
    tokens: int


class _Baselines(SavedRecord):
    version: Literal[1] = 1
    fingerprint: str
    losses: dict[str, _Loss]


def cached_baselines(manifest: DataManifest) -> dict[str, ValidationLoss]:
    """The loss of the `unigram` and the `bigram` model, from the manifest's folder where an earlier call left it.

    The folder is named by its content, so that what was counted there once holds for ever.
    """
    path = manifest.path / BASELINES_NAME
    kept = _read(path, manifest.fingerprint)
    if kept is None:
        losses = {
            name: _Loss(loss=found.loss, tokens=found.tokens) for name, found in baseline_losses(manifest).items()
        }
        kept = _Baselines(fingerprint=manifest.fingerprint, losses=losses)
        kept.save(path)
    return {name: ValidationLoss(found.loss, found.tokens) for name, found in kept.losses.items()}


def _read(path: Path, fingerprint: str) -> _Baselines | None:
    """What is kept; None where there is nothing, or something of another data set or version."""
    try:
        kept = _Baselines.load(path)
    except (FileNotFoundError, ValidationError):
        return None
    return kept if kept.fingerprint == fingerprint else None
