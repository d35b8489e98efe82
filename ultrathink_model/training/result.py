"""What a finished training stage hands on: paths and numbers, never weights."""

import os
import platform
import time
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from ultrathink_model.distributed.context import RankContext
from ultrathink_model.tracking.metrics import read_metrics
from ultrathink_model.tracking.run_folder import RunFolder, write_atomically

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
        seconds: What the run took, pauses between its starts left out; 0 where it is not known.
        device: Name of the devices that it ran on; empty where it is not known.
        devices: Number of GPUs, or of machines where it ran on processors.
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
    seconds: float = 0.0
    device: str = ""
    devices: int = 1

    def save(self) -> None:
        """Writes `result.json` into the run's folder."""
        write_atomically(Path(self.output_dir) / RESULT_FILE, self.model_dump_json(indent=2) + "\n")


def load_result(output_dir: Path) -> StageResult | None:
    """What `result.json` of a run's folder says; None where there is none that can be read."""
    try:
        return StageResult.model_validate_json((output_dir / RESULT_FILE).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def finish_run(
    folder: RunFolder, context: RankContext, run_name: str, steps: int, tokens: int, data_manifest: Path
) -> StageResult:
    """Writes `result.json` with the last value of each metric, and marks the run as finished; rank 0 alone calls it."""
    last: dict[str, float] = {}
    for row in read_metrics(folder.metrics_file):
        last |= row
    record = folder.record()
    device, devices = describe_devices(context)
    result = StageResult(
        name=run_name,
        output_dir=str(folder.path.resolve()),
        final_model=str(folder.final_model.resolve()),
        steps=steps,
        tokens=tokens,
        metrics={name: value for name, value in last.items() if "/" in name},
        mlflow_run_id=record.mlflow_run_id if record else None,
        data_manifest=str(data_manifest),
        seconds=record.seconds(time.time()) if record else 0.0,
        device=device,
        devices=devices,
    )
    result.save()
    folder.set_status("finished")
    return result


def describe_devices(context: RankContext) -> tuple[str, int]:
    """The name of a run's devices, and how many there are: GPUs, or machines where it runs on processors."""
    if context.device.type == "cuda":
        return torch.cuda.get_device_name(context.device), context.world_size
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", context.world_size))
    return _processor_name(), -(-context.world_size // local_ranks)


def _processor_name() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8", errors="replace").splitlines() if known.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
