"""Where a model in the registry comes from, as the tags of its version say it."""

import hashlib
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ultrathink_model.config import config_hash, load_config
from ultrathink_model.evaluation.result import EvaluationResult
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training.result import load_result

PREFIX = "ultrathink."
BLOCK_BYTES = 1 << 20


class StageLine(BaseModel):
    """One stage that led to a model: what it was, how long, with which code, and its MLflow run."""

    model_config = ConfigDict(frozen=True)

    name: str
    steps: int
    tokens: int
    config_sha256: str
    commit: str | None
    mlflow_run_id: str | None


class Lineage(BaseModel):
    """What a model was made from.

    Attributes:
        data_fingerprint: Its prepared data.
        stages: The runs that led to it, the first one first; the last one made it.
        model_sha256: Hash of its weights and config.
    """

    model_config = ConfigDict(frozen=True)

    data_fingerprint: str
    stages: list[StageLine]
    model_sha256: str

    def tags(self) -> dict[str, str]:
        """The lineage as tags of a model version."""
        last = self.stages[-1]
        return {
            f"{PREFIX}data_fingerprint": self.data_fingerprint,
            f"{PREFIX}config_sha256": last.config_sha256,
            f"{PREFIX}commit": last.commit or "unknown",
            f"{PREFIX}stages": json.dumps([stage.model_dump() for stage in self.stages]),
            f"{PREFIX}model_sha256": self.model_sha256,
        }


def read_lineage(run: RunFolder, evaluation: EvaluationResult) -> Lineage:
    """The lineage of the model in a run's folder.

    Args:
        run: A run that is finished.
        evaluation: Its evaluation.
    """
    return Lineage(
        data_fingerprint=evaluation.data_fingerprint,
        stages=[_line(folder) for folder in run.ancestry()],
        model_sha256=_hash_model(run.final_model),
    )


def _line(run: RunFolder) -> StageLine:
    record, result = run.record(), load_result(run.path)
    assert record is not None, "ancestry() names runs"
    return StageLine(
        name=record.run_name,
        steps=result.steps if result else 0,
        tokens=result.tokens if result else 0,
        config_sha256=config_hash(load_config(run.config_file)),
        commit=record.commit,
        mlflow_run_id=record.mlflow_run_id,
    )


def _hash_model(folder: Path) -> str:
    """SHA-256 over the names and contents of the weights and of the model's config."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        digest.update(f"{path.name}\0".encode())
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
