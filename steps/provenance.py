"""Which code made a stage's run, and what it came to, kept in its folder: may a new start go on with it?"""

import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from steps.references import hash_files
from ultrathink_model.config import Config, override_config
from ultrathink_model.tracking.run_folder import RunFolder, write_atomically
from ultrathink_model.training.result import RESULT_FILE

PROVENANCE_NAME = "provenance.json"
MODEL_FOLDER = ("final_model",)


class Provenance(BaseModel):
    """The content of `provenance.json`.

    Attributes:
        code: Hash of the package's code that the run was begun with.
        ordered_at: When the run was ordered, in seconds since 1970; one that began before it is another run.
        model: Hash of the finished run's model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str
    ordered_at: float
    model: str | None = None


def settle_resume(config: Config, code: str) -> Config:
    """Decides what becomes of the run in a stage's folder, now that ZenML has no result of it that counts.

    A run that was cut short is gone on with, also by changed code: mending what stopped it must not cost what was
    done. A finished run stands if the same code made it and its model is untouched; where the model was touched it
    is written again from the last checkpoint; where the code has changed the run is made anew.
    (Other data, other first weights or another config make another run; training sees to that.)

    Returns:
        The config, with `training.resume: never` where the run is to be made anew.
    """
    folder = RunFolder(config.output.output_dir)
    known, record = _read(folder.path), folder.record()
    if known and record and record.started_at >= known.ordered_at:
        if record.status != "finished":
            return config
        if known.code == code:
            if known.model != hash_files(folder.path, MODEL_FOLDER):
                (folder.path / RESULT_FILE).unlink(missing_ok=True)
            return config
    folder.path.mkdir(parents=True, exist_ok=True)
    _write(folder.path, Provenance(code=code, ordered_at=time.time()))
    return override_config(config, ["training.resume=never"]) if record else config


def note_result(folder: Path) -> None:
    """Notes which model a run came to."""
    known = _read(folder)
    assert known is not None, "settle_resume comes first"
    _write(folder, known.model_copy(update={"model": hash_files(folder, MODEL_FOLDER)}))


def _read(folder: Path) -> Provenance | None:
    try:
        return Provenance.model_validate_json((folder / PROVENANCE_NAME).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _write(folder: Path, provenance: Provenance) -> None:
    write_atomically(folder / PROVENANCE_NAME, provenance.model_dump_json(indent=2) + "\n")
