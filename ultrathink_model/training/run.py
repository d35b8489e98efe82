"""One training stage, from a config and prepared data to a finished model, on every rank."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ultrathink_model.config import Config
from ultrathink_model.data import DataManifest, global_batch_size
from ultrathink_model.distributed.context import RankContext, init_distributed
from ultrathink_model.errors import TrainingStoppedError
from ultrathink_model.models.hf import save_model
from ultrathink_model.tracking.metrics import MetricsWriter
from ultrathink_model.tracking.progress import Progress
from ultrathink_model.tracking.run_folder import RunFolder, write_atomically
from ultrathink_model.training.assembly import make_trainer
from ultrathink_model.training.callbacks.metrics import MetricsCallback
from ultrathink_model.training.callbacks.routing import routing_tables
from ultrathink_model.training.memory import explained_memory
from ultrathink_model.training.result import StageResult, finish_run
from ultrathink_model.training.resume import claim_folder, resume_point
from ultrathink_model.training.rng import repeatable_kernels
from ultrathink_model.training.session import ALONE, StagePlace, mlflow_run, noted_ending, on_main
from ultrathink_model.training.signals import StopSignals
from ultrathink_model.training.trainer import Trainer

logger = logging.getLogger(__name__)


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
        batch = global_batch_size(config, context.data_ranks)
        claim = on_main(context, lambda: claim_folder(config, manifest, folder, run_name, init_from, batch))
        if claim.result is not None:
            logger.info("%s is finished already, after %d steps", run_name, claim.result.steps)
            return claim.result
        with noted_ending(config, context, folder), explained_memory(config, context):
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
            done = trainer.position
            return on_main(
                context, lambda: finish_run(folder, context, run_name, done.step, done.tokens, manifest.path)
            )


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
    with mlflow_run(config, folder, run_name, place):
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


def _write_model(trainer: Trainer, manifest: DataManifest, folder: RunFolder) -> None:
    """Writes `final_model/` and `routing.json`; every rank helps to gather the weights."""
    with trainer.averaged_weights():
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
