"""One training stage, from a config and prepared data to a finished model, on every rank."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from ultrathink_model.config import Config
from ultrathink_model.data import DataManifest, global_batch_size
from ultrathink_model.distributed.context import RankContext, broadcast_object, init_distributed
from ultrathink_model.errors import TrainingStoppedError, UltrathinkError
from ultrathink_model.models.hf import save_model
from ultrathink_model.tracking.metrics import MetricsWriter, read_metrics
from ultrathink_model.tracking.mlflow import MlflowRun
from ultrathink_model.tracking.progress import Progress
from ultrathink_model.tracking.run_folder import RunFolder, write_atomically
from ultrathink_model.training.assembly import make_trainer
from ultrathink_model.training.callbacks.metrics import MetricsCallback
from ultrathink_model.training.callbacks.routing import routing_tables
from ultrathink_model.training.log_file import log_to_file
from ultrathink_model.training.result import StageResult
from ultrathink_model.training.resume import claim_folder, resume_point
from ultrathink_model.training.rng import repeatable_kernels
from ultrathink_model.training.signals import StopSignals
from ultrathink_model.training.trainer import Trainer

# A process that was told to stop may be killed half a minute later.
STOPPED_WAIT_SECONDS = 10.0

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


@dataclass(frozen=True)
class StagePlace:
    """Where a stage stands in its pipeline, for those who watch it.

    Attributes:
        number: Number of the stage, from 1.
        of: Stages in the pipeline.
        parent_run_id: MLflow run of the pipeline.
        tags: Tags of the stage's own MLflow run.
    """

    number: int = 1
    of: int = 1
    parent_run_id: str | None = None
    tags: Mapping[str, str] | None = None


ALONE = StagePlace()


def train(
    config: Config, *, manifest: DataManifest, run_name: str, init_from: Path | None = None, place: StagePlace = ALONE
) -> StageResult:
    """Trains one run to its end; every rank calls it.

    The same call again goes on from the newest whole checkpoint, and returns the result at once where the run is
    finished (`training.resume: auto`).

    Args:
        config: The run.
        manifest: Its prepared data.
        run_name: Its name, in MLflow too.
        init_from: A model folder that gives the first weights; features that its model lacks are grafted on.
        place: Where the stage stands in its pipeline.

    Returns:
        The result, on every rank.

    Raises:
        TrainingStoppedError: A signal came; the state is saved.
        UltrathinkError: A mistake that the user can mend, in the config, the data, a checkpoint or the loss.
    """
    context = init_distributed(config)
    folder = RunFolder(config.output.output_dir)
    with StopSignals() as signals, repeatable_kernels(config.training.deterministic):
        batch = global_batch_size(config, context.world_size)
        claim = on_main(context, lambda: claim_folder(config, manifest, folder, run_name, init_from, batch))
        if claim.result is not None:
            logger.info("%s is finished already, after %d steps", run_name, claim.result.steps)
            return claim.result
        with _noted_ending(config, context, folder):
            point = on_main(context, lambda: resume_point(claim, config, manifest, folder, batch))
            metrics = MetricsCallback(config.logging.log_steps)
            trainer = make_trainer(config, context, manifest, folder, signals, metrics, point, init_from)
            with _watched(config, context, folder, run_name, place, trainer, metrics):
                ending = trainer.fit()
                if ending == "stopped":
                    raise TrainingStoppedError(
                        f"{run_name} was stopped by {signals.received or 'a signal to another rank'} after step "
                        f"{trainer.position.step} of {trainer.length.steps}, and saved in {folder.path}; start the "
                        "same command again to go on."
                    )
                _write_model(trainer, manifest, folder)
            return on_main(context, lambda: _write_result(trainer, manifest, folder, run_name))


def on_main(context: RankContext, work: Callable[[], Value]) -> Value:
    """What `work` returns on rank 0, on every rank; a typed error there is raised on all of them."""
    value: Value | None = None
    error: UltrathinkError | None = None
    if context.is_main:
        try:
            value = work()
        except UltrathinkError as raised:
            error = raised
    value, error = broadcast_object((value, error))
    if error is not None:
        raise error
    return value


@contextmanager
def _noted_ending(config: Config, context: RankContext, folder: RunFolder) -> Iterator[None]:
    """Keeps the log of a start in the run's folder, and notes in `run.json` how it ended, unless it finished."""
    if not context.is_main:
        yield
        return
    with log_to_file(folder.log_file, config.logging.log_level):
        try:
            yield
        except TrainingStoppedError:
            folder.set_status("stopped")
            raise
        except BaseException:
            folder.set_status("failed")
            raise


@contextmanager
def _watched(
    config: Config,
    context: RankContext,
    folder: RunFolder,
    run_name: str,
    place: StagePlace,
    trainer: Trainer,
    metrics: MetricsCallback,
) -> Iterator[None]:
    """Has rank 0's figures go to `metrics.jsonl`, to the terminal and to MLflow."""
    if not context.is_main:
        yield
        return
    metrics.writer = MetricsWriter(folder.metrics_file)
    metrics.writer.truncate_after(trainer.position.step)
    with _mlflow(config, folder, run_name, place):
        progress = Progress(
            run_name,
            trainer.length.steps,
            log_steps=config.logging.log_steps,
            stage=place.number,
            stages=place.of,
            first_step=trainer.position.step,
        )
        with progress:
            metrics.progress = progress
            yield


@contextmanager
def _mlflow(config: Config, folder: RunFolder, run_name: str, place: StagePlace) -> Iterator[None]:
    """An MLflow run that is fed from the folder while it is open, and closed as the block ends."""
    if not config.logging.use_mlflow:
        yield
        return
    run = MlflowRun.start(config, run_name, folder, parent_run_id=place.parent_run_id, tags=place.tags)
    try:
        yield
    except TrainingStoppedError:
        run.finish("KILLED", STOPPED_WAIT_SECONDS)
        raise
    except BaseException:
        run.finish("FAILED", STOPPED_WAIT_SECONDS)
        raise
    else:
        if folder.routing_file.exists():
            run.log_artifact(folder.routing_file)
        run.finish()
    finally:
        if run.run_id is not None:
            folder.set_mlflow_run_id(run.run_id)


def _write_model(trainer: Trainer, manifest: DataManifest, folder: RunFolder) -> None:
    """Writes `final_model/` and `routing.json`; every rank helps to gather the weights."""
    state: dict[str, Tensor] = trainer.strategy.full_model_state()
    statistics = trainer.model.routing_statistics()

    def write() -> None:
        if statistics:
            groups = trainer.config.moe.group_sizes if trainer.config.advanced.enable_moe else {}
            tables = {"groups": groups, **routing_tables(statistics)}
            write_atomically(folder.routing_file, json.dumps(tables, indent=2, allow_nan=False) + "\n")
        save_model(trainer.model, manifest.tokenizer_folder, folder.final_model, trainer.config, state)
        logger.info("wrote %s", folder.final_model)

    on_main(trainer.strategy.context, write)


def _write_result(trainer: Trainer, manifest: DataManifest, folder: RunFolder, run_name: str) -> StageResult:
    last: dict[str, float] = {}
    for row in read_metrics(folder.metrics_file):
        last |= row
    record = folder.record()
    result = StageResult(
        name=run_name,
        output_dir=str(folder.path.resolve()),
        final_model=str(folder.final_model.resolve()),
        steps=trainer.position.step,
        tokens=trainer.position.tokens,
        metrics={name: value for name, value in last.items() if "/" in name},
        mlflow_run_id=record.mlflow_run_id if record else None,
        data_manifest=str(manifest.path),
    )
    result.save()
    folder.set_status("finished")
    return result
