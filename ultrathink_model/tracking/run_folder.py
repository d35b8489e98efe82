"""The folder of a run: where each file lies, and whether a new start goes on or begins another run."""

import hashlib
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ultrathink_model.config import Config, save_config
from ultrathink_model.errors import ConfigError
from ultrathink_model.tracking.commit import current_commit

RunStatus = Literal["running", "stopped", "finished", "failed"]

CHECKPOINT_NAME = re.compile(r"checkpoint_(\d{8,})\.pt")

# Files of a run that give way to the next one. `final_model/` is not among them: the next run may start from it.
RUN_FILES = (
    "config.yaml",
    "training.log",
    "metrics.jsonl",
    "system_metrics.jsonl",
    "mlflow.json",
    "report.html",
    "evaluation.json",
    "gates.json",
    "samples.json",
    "samples.jsonl",
    "routing.json",
    "result.json",
    "revisions.jsonl",
    "choices.jsonl",
    "preferences.jsonl",
    "tuning.json",
    "profile",
)

# These decide how a run is watched or carried out, or what is made of its model, not what it computes.
NOT_PART_OF_IDENTITY = ("logging", "distributed", "promotion", "export")
NOT_PART_OF_DATA = ("allow_changed", "executor", "executor_workers", "slurm_partition", "slurm_time")


class RunIdentity(BaseModel):
    """What makes two starts the same run: its name, its first weights, its config and its prepared data.

    The config counts without `logging`, `distributed`, `promotion`, `export`, `training.resume` and what only a finished model is
    evaluated with, so that a run can go on with another log level, on another number of ranks, from a checkpoint named
    by path, or under another gate.
    """

    model_config = ConfigDict(frozen=True)

    run_name: str
    init_from: str | None
    config_hash: str
    data_fingerprint: str = ""

    @classmethod
    def of(cls, config: Config, run_name: str, init_from: Path | None = None) -> "RunIdentity":
        """The identity of a run of `config` that starts from the model folder `init_from`, or from a seed."""
        values = config.model_dump(mode="json", exclude={*NOT_PART_OF_IDENTITY, "output"})
        del values["training"]["resume"]
        values["evaluation"] = config.evaluation.while_training().model_dump(mode="json")
        values["data"] = {key: value for key, value in values["data"].items() if key not in NOT_PART_OF_DATA}
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        return cls(run_name=run_name, init_from=str(init_from.resolve()) if init_from else None, config_hash=digest)


class RunRecord(BaseModel):
    """The content of `run.json`; times are seconds since 1970.

    Attributes:
        identity: What makes it this run.
        run_name: Its name.
        status: How it stands.
        started_at: When it was first started.
        updated_at: When this was written.
        resumed_at: When it was last started.
        earlier_seconds: What it ran before that, pauses left out.
        mlflow_run_id: The MLflow run that tracks it.
        commit: That of the code that it was begun with; None where it is not known.
    """

    identity: RunIdentity
    run_name: str
    status: RunStatus
    started_at: float
    updated_at: float
    resumed_at: float | None = None
    earlier_seconds: float = 0.0
    mlflow_run_id: str | None = None
    commit: str | None = None

    def seconds(self, until: float) -> float:
        """What the run took up to a time, pauses between its starts left out."""
        return self.earlier_seconds + max(0.0, until - (self.resumed_at or self.started_at))


class RunFolder:
    """The paths of a run's folder, and its `run.json`.

    Only rank 0 may write through it. Its methods may be called from several threads.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.log_file = self.path / "training.log"
        self.metrics_file = self.path / "metrics.jsonl"
        self.system_metrics_file = self.path / "system_metrics.jsonl"
        self.mlflow_file = self.path / "mlflow.json"
        self.final_model = self.path / "final_model"
        self.report_file = self.path / "report.html"
        self.evaluation_file = self.path / "evaluation.json"
        self.gates_file = self.path / "gates.json"
        self.samples_file = self.path / "samples.json"
        self.routing_file = self.path / "routing.json"
        self.revisions_file = self.path / "revisions.jsonl"
        self.choices_file = self.path / "choices.jsonl"
        self.preferences_file = self.path / "preferences.jsonl"
        self.run_file = self.path / "run.json"
        self._lock = threading.Lock()

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after optimizer step `step`."""
        return self.path / f"checkpoint_{step:08d}.pt"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Step and folder of each checkpoint that stands under its final name, oldest first."""
        if not self.path.is_dir():
            return []
        named = ((CHECKPOINT_NAME.fullmatch(entry.name), entry) for entry in self.path.iterdir())
        return sorted((int(match[1]), entry) for match, entry in named if match)

    def record(self) -> RunRecord | None:
        """What `run.json` says; None where there is none that can be read."""
        try:
            return RunRecord.model_validate_json(self.run_file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def ancestry(self) -> list["RunFolder"]:
        """The runs that led to this one's model, the first one first and this one last, as far as they are still there."""
        found: list[RunFolder] = []
        folder: Path | None = self.path.resolve()
        while folder is not None and folder not in [run.path for run in found]:
            run = RunFolder(folder)
            record = run.record()
            if record is None:
                break
            found.append(run)
            first = record.identity.init_from
            folder = Path(first).parent if first and Path(first).is_dir() else None
        return found[::-1]

    def begin(self, identity: RunIdentity, config: Config, *, fresh: bool = False) -> bool:
        """Takes the folder for a run and writes `run.json` and `config.yaml`.

        The files of another run, or of the same one when `fresh`, are moved to `previous/<its name>/` first.
        Call this before anything else writes into the folder.

        Returns:
            True when the same run goes on here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        found = self.record()
        goes_on = found is not None and found.identity == identity and not fresh
        if not goes_on:
            self._move_away(found)
        now = time.time()
        record = found if goes_on and found else None
        self._write(
            RunRecord(
                identity=identity,
                run_name=identity.run_name,
                status="running",
                started_at=record.started_at if record else now,
                updated_at=now,
                resumed_at=now,
                earlier_seconds=record.seconds(self._last_sign(record)) if record else 0.0,
                mlflow_run_id=record.mlflow_run_id if record else None,
                commit=record.commit if record else current_commit(),
            )
        )
        save_config(config, self.config_file)
        return goes_on

    def set_status(self, status: RunStatus) -> None:
        """Notes in `run.json` how the run stands."""
        self._update(status=status)

    def set_mlflow_run_id(self, run_id: str) -> None:
        """Notes in `run.json` the MLflow run that tracks this one."""
        self._update(mlflow_run_id=run_id)

    def _last_sign(self, record: RunRecord) -> float:
        """When a run was last alive, as far as its files tell: one that was killed could not note it."""
        metrics = self.metrics_file
        return max(record.updated_at, metrics.stat().st_mtime if metrics.is_file() else 0.0)

    def _update(self, **changes: str) -> None:
        with self._lock:
            record = self.record()
            assert record is not None, "begin() comes first"
            self._write(record.model_copy(update={**changes, "updated_at": time.time()}))

    def _write(self, record: RunRecord) -> None:
        write_atomically(self.run_file, record.model_dump_json(indent=2) + "\n")

    def _move_away(self, record: RunRecord | None) -> None:
        """Moves a run's files; `run.json` goes last, so that a cut move is taken up again by the next start."""
        if record is None:
            # Without run.json, config.yaml and the like may be the user's own: only what can mislead a run moves.
            names = ["metrics.jsonl", "system_metrics.jsonl", "mlflow.json", "run.json"]
        else:
            names = [*RUN_FILES, "run.json"]
        paths = [folder for _, folder in self.checkpoints()] + [self.path / name for name in names]
        paths = [path for path in paths if path.exists()]
        if not paths:
            return
        destination = self._previous_folder(record.run_name if record else "unnamed")
        for path in paths:
            path.rename(destination / path.name)

    def _previous_folder(self, run_name: str) -> Path:
        name = re.sub(r"[^\w.-]+", "_", run_name).strip(".") or "unnamed"
        number = 1
        while True:
            folder = self.path / "previous" / (name if number == 1 else f"{name}-{number}")
            if not (folder / "run.json").exists() and not (name == "unnamed" and folder.exists()):
                folder.mkdir(parents=True, exist_ok=True)
                return folder
            number += 1


def find_run(path: Path) -> RunFolder:
    """The run of a folder: its own, or that of the last stage of the workflow that wrote it.

    Raises:
        ConfigError: It holds neither.
    """
    inside = sorted(entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
    folders = [RunFolder(path), *map(RunFolder, inside)]
    runs = [(record.started_at, folder) for folder in folders if (record := folder.record()) is not None]
    if not runs:
        raise ConfigError(
            f"{path} holds no run; name the folder of a run or of a workflow, such as outputs/tiny_model/production."
        )
    return runs[0][1] if runs[0][1].path == path else max(runs, key=lambda run: run[0])[1]


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's content in one step: a reader sees the old text or the new, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
