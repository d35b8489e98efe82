"""What a finished training stage hands on: paths and numbers, never weights."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ultrathink_model.tracking.run_folder import write_atomically

RESULT_FILE = "result.json"


class StageResult(BaseModel):
    """A finished stage.

    Attributes:
        name: The run's name.
        output_dir: The run's folder.
        final_model: The model in Hugging Face format.
        steps: Optimizer steps.
        tokens: Tokens trained on.
        metrics: Last value of each metric, by MLflow's names.
        mlflow_run_id: The MLflow run; None where there is none.
        data_manifest: Folder of the prepared data.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    output_dir: str
    final_model: str
    steps: int
    tokens: int
    metrics: dict[str, float]
    mlflow_run_id: str | None
    data_manifest: str

    def save(self) -> None:
        """Writes `result.json` into the run's folder."""
        write_atomically(Path(self.output_dir) / RESULT_FILE, self.model_dump_json(indent=2) + "\n")


def load_result(output_dir: Path) -> StageResult | None:
    """What `result.json` of a run's folder says; None where there is none that can be read."""
    try:
        return StageResult.model_validate_json((output_dir / RESULT_FILE).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
