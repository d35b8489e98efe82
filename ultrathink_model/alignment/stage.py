"""What every part of an alignment stage needs, and how such a stage is measured and closed."""

import contextlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from ultrathink_model.alignment.learner import Learner
from ultrathink_model.config import Config, config_hash
from ultrathink_model.data.batch import Batch
from ultrathink_model.data.loader import ValidationLoader
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.distributed.context import RankContext, all_reduce_sum
from ultrathink_model.errors import TrainingStoppedError
from ultrathink_model.evaluation.perplexity import validation_loss
from ultrathink_model.models.transformer import ModelOutput
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training.checkpoint import CheckpointManifest, RunPosition, save_checkpoint
from ultrathink_model.training.result import StageResult, finish_run
from ultrathink_model.training.resume import ResumePoint, claim_folder, resume_point
from ultrathink_model.training.retention import prune
from ultrathink_model.training.rng import repeatable_kernels, seed_generators
from ultrathink_model.training.session import StagePlace, mlflow_run, noted_ending, on_main
from ultrathink_model.training.signals import StopSignals

PAIRS_FILE = "pairs.jsonl"
REWARD_MODEL = "reward_model"

logger = logging.getLogger(__name__)


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


def run_in_folder(
    config: Config,
    context: RankContext,
    manifest: DataManifest,
    run_name: str,
    init_from: Path,
    place: StagePlace,
    global_batch: int,
    work: Callable[[Stage, ResumePoint | None], StageResult],
) -> StageResult:
    """Takes the run's folder and does a stage's work there, from its newest checkpoint on; every rank calls it.

    Args:
        config: The run, with the architecture of the model that it starts from.
        context: This rank.
        manifest: Prepared data.
        run_name: Its name.
        init_from: The model folder that is started from.
        place: Where the stage stands in its pipeline.
        global_batch: Samples in one step, over all ranks; a checkpoint of another number does not fit.
        work: Does the rest, with the checkpoint that it goes on from.

    Returns:
        What `work` returns, or what the run came to where it is finished already.
    """
    folder = RunFolder(config.output.output_dir)
    with StopSignals() as signals, repeatable_kernels(config.training.deterministic):
        claim = on_main(context, lambda: claim_folder(config, manifest, folder, run_name, init_from, global_batch))
        if claim.result is not None:
            logger.info("%s is finished already, after %d steps", run_name, claim.result.steps)
            return claim.result
        if context.is_main and not claim.goes_on:
            _forget_other_runs(folder)
        with noted_ending(config, context, folder):
            point = on_main(context, lambda: resume_point(claim, config, manifest, folder, global_batch))
            tokenizer = Tokenizer.load(manifest.tokenizer_folder)
            stage = Stage(config, context, manifest, tokenizer, folder, run_name, signals)
            seed_generators(config.training.seed, context.rank)
            with mlflow_run(config, folder, run_name, place) if context.is_main else contextlib.nullcontext():
                return work(stage, point)


def _forget_other_runs(folder: RunFolder) -> None:
    """Deletes the pairs and the reward model of another run, which this one must not take for its own."""
    (folder.path / PAIRS_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder.path / REWARD_MODEL, ignore_errors=True)


def save_position(
    stage: Stage,
    position: RunPosition,
    tensors: dict[str, Any],
    rank_state: dict[str, Any],
    strategy: str,
    global_batch: int,
) -> None:
    """Writes a checkpoint of a stage, and deletes those that are kept no longer; every rank calls it together."""
    config, context = stage.config, stage.context
    manifest = CheckpointManifest(
        position=position.model_copy(),
        config_hash=config_hash(config),
        config=config.model_dump(mode="json"),
        tokenizer_hash=stage.manifest.tokenizer_hash,
        data_fingerprint=stage.manifest.fingerprint,
        strategy=strategy,
        world_size=context.world_size,
        global_batch=global_batch,
    )
    save_checkpoint(stage.folder.checkpoint(position.step), tensors, rank_state, manifest)
    if context.is_main:
        prune(stage.folder.checkpoints(), config.training)


def held_out_loss(stage: Stage, learner: Learner) -> float:
    """Loss on the whole validation split, as training's last."""
    context = stage.context
    loader = ValidationLoader(stage.manifest, stage.config, rank=context.rank, world_size=context.world_size)

    def forward(batch: Batch) -> ModelOutput:
        return learner.forward(batch.input_ids, labels=batch.labels, document_ids=batch.document_ids, media=batch.media)

    return validation_loss(forward, loader, context.device, all_reduce_sum).loss


def write_result(stage: Stage, steps: int, tokens: int) -> StageResult:
    """Writes `result.json` and marks the run as finished; rank 0 alone calls it."""
    return finish_run(stage.folder, stage.context, stage.run_name, steps, tokens, stage.manifest.path)
