"""Putting a run together: model, strategy, data and callbacks, at step 0 or after a checkpoint."""

import functools
import logging
from collections.abc import Iterator
from pathlib import Path

from ultrathink_model.config import Config
from ultrathink_model.data import Batch, DataManifest, TrainLoader
from ultrathink_model.data.safety import with_safety_rows
from ultrathink_model.distributed.context import RankContext, broadcast_object, strategy_name
from ultrathink_model.distributed.strategy import make_strategy
from ultrathink_model.errors import DependencyError
from ultrathink_model.models.multimodal.encoder_weights import take_encoders
from ultrathink_model.models.native.kernels import use_native_kernels
from ultrathink_model.models.native.library import find_compiler
from ultrathink_model.models.transformer import Transformer, build_model
from ultrathink_model.models.upcycle import initialise_from
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training.callbacks.evaluation import EvaluationCallback
from ultrathink_model.training.callbacks.garbage import GarbageCallback
from ultrathink_model.training.callbacks.gradient_health import GradientHealthCallback
from ultrathink_model.training.callbacks.metrics import MetricsCallback
from ultrathink_model.training.callbacks.profiling import ProfilingCallback
from ultrathink_model.training.callbacks.samples import SamplesCallback
from ultrathink_model.training.callbacks.saving import SavingCallback, saved_tensors
from ultrathink_model.training.checkpoint import RunPosition, load_tensors, read_rank_state
from ultrathink_model.training.length import run_length
from ultrathink_model.training.optimizer import make_optimizer
from ultrathink_model.training.resume import ResumePoint, last_good_checkpoint
from ultrathink_model.training.rng import restore_generators, seed_generators
from ultrathink_model.training.signals import StopSignals
from ultrathink_model.training.throughput import Throughput
from ultrathink_model.training.trainer import Trainer
from ultrathink_model.training.watch import RankWatch

logger = logging.getLogger(__name__)


def make_trainer(
    config: Config,
    context: RankContext,
    manifest: DataManifest,
    folder: RunFolder,
    signals: StopSignals,
    metrics: MetricsCallback,
    point: ResumePoint | None,
    init_from: Path | None,
) -> Trainer:
    """A trainer that is ready for `fit`, on every rank.

    Args:
        config: The run.
        context: This rank.
        manifest: Prepared data.
        folder: Where checkpoints go.
        signals: What may stop the run.
        metrics: Takes all figures.
        point: The checkpoint to go on from; None begins at step 0.
        init_from: Model folder of the first weights, for a run that begins.

    Raises:
        UltrathinkError: The model folder, the checkpoint or the strategy does not go with the config.
    """
    model = build_model(config, "cpu")
    if model.media_encoder is not None and point is None:
        for key, tensors in take_encoders(model.media_encoder, config).items():
            logger.info("%s: %d tensors taken", key, tensors)
    if init_from is not None and point is None:
        report = initialise_from(model, init_from, manifest.tokenizer_folder)
        logger.info("weights of %s: %s", init_from, report.summary())
    compile_model(model, config, context)
    strategy = make_strategy(config, context)
    strategy.prepare(model, functools.partial(make_optimizer, config.training))
    position = point.manifest.position.model_copy() if point else RunPosition()
    loader = TrainLoader(manifest, config, rank=context.data_rank, world_size=context.data_ranks)

    def batches_from(step: int) -> Iterator[list[Batch]]:
        steps = loader.steps_from(step)
        return with_safety_rows(steps, manifest, config, context.data_rank, context.data_ranks, first_step=step)

    seed_generators(config.training.seed, context.data_rank)
    evaluation = EvaluationCallback(
        config, manifest, context, metrics.extra, at_start=init_from is not None and point is None
    )
    callbacks = [
        evaluation,
        # Each line holds the evaluation of its step, and is on disk before the checkpoint of its step.
        metrics,
        GradientHealthCallback(metrics),
        SavingCallback(config, manifest, context, folder),
    ]
    if config.evaluation.sample_steps is not None:
        callbacks.append(SamplesCallback(config.evaluation.sample_steps, config, manifest, context, folder))
    if config.training.gc_steps is not None:
        callbacks.append(GarbageCallback(config.training.gc_steps))
    if config.logging.profile_steps is not None:
        callbacks.append(ProfilingCallback(config.logging.profile_steps, folder.path / "profile", context))
    trainer = Trainer(
        config,
        strategy,
        batches_from,
        run_length(config, manifest, loader, context.data_ranks),
        position,
        signals,
        callbacks,
        functools.partial(go_back, folder),
        RankWatch(config, context, folder),
    )
    trainer.throughput = Throughput.of(config, context)
    if point is not None:
        restore(trainer, point)
    return trainer


def restore(trainer: Trainer, point: ResumePoint) -> None:
    """Brings model, optimizer, loss scaler and generators to where a checkpoint was taken.

    Raises:
        CheckpointError: Its tensors do not fit.
    """
    context = trainer.strategy.context
    tensors = saved_tensors(trainer)
    saved = point.manifest.config["training"]
    has_part = {
        "scaler": saved["use_amp"] and saved["amp_dtype"] == "fp16",
        "average": saved.get("ema_decay") is not None,
        "spikes": saved.get("spike_deviations") is not None,
    }
    trainer.measured = dict(point.manifest.metrics)
    load_tensors(point.folder, {name: part for name, part in tensors.items() if has_part.get(name, True)})
    trainer.strategy.load_state_dict({name: tensors[name] for name in ("model", "optimizer")})
    if trainer.average is not None:
        trainer.average.load_state_dict(tensors["average"]) if has_part["average"] else trainer.average.begin()
    rank_state = read_rank_state(point.folder, context.first_of_row)
    if rank_state is None:
        logger.info("%s has no generators of rank %d, which draws anew", point.folder, context.first_of_row)
    else:
        restore_generators(rank_state, context.device)
    logger.info("goes on after step %d of %s", trainer.position.step, point.folder)


def go_back(folder: RunFolder, trainer: Trainer) -> RunPosition | None:
    """Brings a run that goes astray back to its last good checkpoint; every rank calls it.

    Returns:
        The position of the checkpoint; None where there is none.
    """
    is_main = trainer.strategy.context.is_main
    point: ResumePoint | None = broadcast_object(last_good_checkpoint(folder) if is_main else None)
    if point is None:
        return None
    restore(trainer, point)
    return point.manifest.position.model_copy()


def compile_model(model: Transformer, config: Config, context: RankContext) -> None:
    """Has compiled what the config says: operators of our own, and each block by `torch.compile` at its first call.

    Blocks alike are compiled once, and sharded ones stay apart.

    Raises:
        DependencyError: There is no compiler for the code that torch.compile makes for a processor.
    """
    if config.training.native_kernels and context.device.type == "cpu":
        is_zero_3 = strategy_name(config) == "deepspeed" and config.distributed.zero_stage == 3
        use_native_kernels(model, weights_come_when_called=is_zero_3)
    if not config.training.compile:
        return
    if context.device.type == "cpu" and find_compiler() is None:
        raise DependencyError(
            "training.compile=true needs a C++ compiler on a machine without a GPU, and there is no g++ or clang++; "
            "install one, or set training.compile=false"
        )
    for block in model.blocks:
        block.compile()
