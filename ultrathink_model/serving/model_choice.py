"""Which model a command means."""

from pathlib import Path

from ultrathink_model.errors import CheckpointError
from ultrathink_model.models.hf_config import CONFIG_FILE
from ultrathink_model.models.model_folder import existing_folder
from ultrathink_model.tracking.run_folder import RunFolder

OUTPUTS = Path("outputs")


def find_model(name: str | None) -> Path:
    """The model's folder that a user means.

    Args:
        name: A model's folder, or a run's or a workflow's folder with a model in it; None takes the model of the run
            under `outputs/` that finished last.

    Raises:
        CheckpointError: There is no such model.
    """
    if name is None:
        return newest_model(OUTPUTS)
    folder = existing_folder(Path(name))
    for candidate in (folder, folder / "final_model", folder / "export"):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    raise CheckpointError(
        f"{folder} holds no model: neither it nor final_model/ or export/ in it has a {CONFIG_FILE}; name such a folder."
    )


def newest_model(outputs: Path) -> Path:
    """`final_model/` of the run that finished last.

    Raises:
        CheckpointError: No run has finished.
    """
    runs = [RunFolder(file.parent) for file in outputs.rglob("run.json") if "previous" not in file.parts]
    records = [(record, run) for run in runs if (record := run.record()) and (run.final_model / CONFIG_FILE).is_file()]
    finished = [(record.updated_at, str(run.final_model)) for record, run in records if record.status == "finished"]
    if not finished:
        raise CheckpointError(
            f"no run under {outputs.resolve()} has finished; train one (`make prototype`), or name a model's folder."
        )
    return Path(max(finished)[1])
