"""What a stage's run was made from, kept in its folder, so that a new start knows whether to go on with it."""

import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ultrathink_model.config import Config, override_config
from ultrathink_model.tracking.run_folder import RunFolder, write_atomically

PROVENANCE_NAME = "provenance.json"


class Provenance(BaseModel):
    """What a run of a stage follows from, beside its config.

    Attributes:
        code: Hash of the package's code.
        data: Fingerprint of the prepared data.
        init_from: Hash of the model that it starts from.
        ordered_at: When the run was ordered, in seconds since 1970; a run that began before is another one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str
    data: str
    init_from: str | None
    ordered_at: float


def settle_resume(config: Config, code: str, data: str, init_from: str | None) -> Config:
    """The config with `training.resume: never` where the run in its folder must not be gone on with.

    A run goes on when it started from the same data and model. A finished run must have come from the same code too:
    ZenML has just decided that its result does not count. A run that was cut short goes on with changed code, because
    mending what stopped it must not cost what it had done.
    """
    folder = RunFolder(config.output.output_dir)
    wanted = Provenance(code=code, data=data, init_from=init_from, ordered_at=time.time())
    known, record = _read(folder.path), folder.record()
    began_as_ordered = known is not None and record is not None and record.started_at >= known.ordered_at
    if known and record and began_as_ordered and (known.data, known.init_from) == (data, init_from):
        if record.status != "finished" or known.code == code:
            return config
    folder.path.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.path / PROVENANCE_NAME, wanted.model_dump_json(indent=2) + "\n")
    return override_config(config, ["training.resume=never"]) if record else config


def _read(folder: Path) -> Provenance | None:
    try:
        return Provenance.model_validate_json((folder / PROVENANCE_NAME).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
