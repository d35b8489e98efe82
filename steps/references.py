"""What steps pass to each other: where a result lies, and a hash that tells whether it still is what it was."""

import hashlib
import json
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from ultrathink_model.errors import CheckpointError
from ultrathink_model.tracking.remote_folder import download, upload, without_checkpoints
from ultrathink_model.workflow import StepPlan

BLOCK_BYTES = 1 << 20


class Reference(BaseModel):
    """A result on disk.

    Attributes:
        uri: The folder of the result, absolute, or its address in a remote store.
        copy_folder: Where a machine has its copy of what lies in a remote store; empty for a folder on a disk.
        files: Names within the folder that make the result; a folder among them stands for all that it holds.
        sha256: Hash over the names and contents of those files.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    copy_folder: str = ""
    files: tuple[str, ...]
    sha256: str

    @property
    def folder(self) -> Path:
        """The folder of the result on this machine; `fetch` brings it there."""
        return Path(self.copy_folder or self.uri)

    def fetch(self) -> Self:
        """Has this machine hold the result, less checkpoints, and returns the reference.

        Raises:
            CheckpointError: It is no more in the store, or has changed there.
        """
        if self.copy_folder and hash_files(self.folder, self.files) != self.sha256:
            download(self.uri, self.folder, without_checkpoints)
            if hash_files(self.folder, self.files) != self.sha256:
                raise CheckpointError(f"{self.uri} is not what its step left there; run that step again.")
        return self

    def is_intact(self) -> bool:
        """Whether the result is still there, unchanged; a result on another machine's storage counts as intact."""
        return "://" in self.uri or hash_files(self.folder, self.files) == self.sha256


class DataReference(Reference):
    """Prepared data: the folder of a manifest, which names its shards and their sizes."""

    fingerprint: str


class StageReference(Reference):
    """A trained stage: its run's folder.

    Attributes:
        name: The stage's name in its workflow.
        step: Optimizer steps trained.
        tokens: Tokens trained on.
        started_at: When the run began, in seconds since 1970; two runs of one config are told apart by it.
        mlflow_run_id: The run that tracks it.
    """

    name: str
    step: int
    tokens: int
    started_at: float
    mlflow_run_id: str | None

    @property
    def final_model(self) -> Path:
        """The trained model."""
        return self.folder / "final_model"


class EvaluationReference(Reference):
    """An evaluated stage: `evaluation.json`, `samples.json` and `report.html` in its run's folder."""

    name: str
    metrics: dict[str, float]
    mlflow_run_id: str | None


class GateReference(Reference):
    """The decision on a stage's model: `gates.json` in its run's folder."""

    passed: bool
    reason: str


class ExportReference(Reference):
    """An exported model."""


class ReportReference(Reference):
    """The report over all stages of a workflow."""


def publish(plan: StepPlan, folder: Path, names: tuple[str, ...] | None = None) -> dict[str, str]:
    """Where the next steps find what a step of a plan left in a folder: the first two fields of a reference.

    Where the steps have machines of their own, the folder is copied to the workflow's place in the remote store.

    Args:
        plan: The step.
        folder: What it wrote.
        names: Files and folders in it to copy; None copies all.
    """
    if plan.remote is None:
        return {"uri": str(folder.resolve())}
    inside = folder.is_relative_to(plan.folder)
    place = folder.relative_to(plan.folder).as_posix() if inside else f"data/{folder.name}"
    uri = plan.remote if place == "." else f"{plan.remote}/{place}"
    upload(folder, uri, names)
    return {"uri": uri, "copy_folder": str(folder)}


def hash_files(folder: Path, names: tuple[str, ...]) -> str:
    """SHA-256 over the named files and folders; a name that is missing changes it too."""
    digest = hashlib.sha256()
    for name in sorted(names):
        path = folder / name
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            content = _hash_file(file) if file.is_file() else "missing"
            digest.update(json.dumps([file.relative_to(folder).as_posix(), content]).encode())
    return digest.hexdigest()


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
