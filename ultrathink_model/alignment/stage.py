"""What every part of an alignment stage needs, and how such a stage is measured and closed."""

from dataclasses import dataclass
from typing import NoReturn

import torch

from ultrathink_model.alignment.learner import Learner
from ultrathink_model.config import Config
from ultrathink_model.data.batch import Batch
from ultrathink_model.data.loader import ValidationLoader
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.distributed.context import RankContext, all_reduce_sum
from ultrathink_model.errors import TrainingStoppedError
from ultrathink_model.evaluation.perplexity import validation_loss
from ultrathink_model.models.transformer import ModelOutput
from ultrathink_model.tracking.metrics import read_metrics
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training.result import StageResult
from ultrathink_model.training.signals import StopSignals


@dataclass(frozen=True)
class Stage:
    """A stage on its way."""

    config: Config
    context: RankContext
    manifest: DataManifest
    tokenizer: Tokenizer
    folder: RunFolder
    run_name: str
    signals: StopSignals

    def is_asked_to_stop(self) -> bool:
        """Whether a signal has reached any rank; every rank calls it together."""
        return bool(all_reduce_sum(torch.tensor(int(self.signals.received is not None))))

    def stop(self, done: str) -> NoReturn:
        """Ends the stage.

        Args:
            done: What has been done and saved.

        Raises:
            TrainingStoppedError: Always.
        """
        raise TrainingStoppedError(
            f"{self.run_name} was stopped by {self.signals.received or 'a signal to another rank'} {done} in "
            f"{self.folder.path}; start the same command again to go on."
        )


def held_out_loss(stage: Stage, learner: Learner) -> float:
    """Loss on the whole validation split, as training's last."""
    context = stage.context
    loader = ValidationLoader(stage.manifest, stage.config, rank=context.rank, world_size=context.world_size)

    def forward(batch: Batch) -> ModelOutput:
        return learner.forward(batch.input_ids, labels=batch.labels, document_ids=batch.document_ids)

    return validation_loss(forward, loader, context.device, all_reduce_sum).loss


def write_result(stage: Stage, steps: int, tokens: int) -> StageResult:
    """Writes `result.json` with the last value of each metric, and marks the run as finished; rank 0 alone calls it."""
    last: dict[str, float] = {}
    for row in read_metrics(stage.folder.metrics_file):
        last |= row
    record = stage.folder.record()
    result = StageResult(
        name=stage.run_name,
        output_dir=str(stage.folder.path.resolve()),
        final_model=str(stage.folder.final_model.resolve()),
        steps=steps,
        tokens=tokens,
        metrics={name: value for name, value in last.items() if "/" in name},
        mlflow_run_id=record.mlflow_run_id if record else None,
        data_manifest=str(stage.manifest.path),
    )
    result.save()
    stage.folder.set_status("finished")
    return result
