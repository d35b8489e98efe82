"""Checkpoints while training."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from ultrathink_model.config import Config, config_hash
from ultrathink_model.data import DataManifest
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.errors import CheckpointError
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training.callbacks.callback import Callback
from ultrathink_model.training.checkpoint import CheckpointManifest, drop_checkpoints
from ultrathink_model.training.checkpoint_writer import CheckpointWriter
from ultrathink_model.training.retention import prune
from ultrathink_model.training.rng import generator_state

if TYPE_CHECKING:
    from ultrathink_model.training.trainer import Trainer

logger = logging.getLogger(__name__)


class SavingCallback(Callback):
    """Saves a checkpoint every `training.checkpoint_steps` steps, or at the ends of epochs where that is null.

    It saves too at the epochs that are validated, at the end, and when a signal stops the run. Under
    `training.async_checkpoints` training goes on while a copy is written; the end and a signal wait for it.
    """

    def __init__(self, config: Config, manifest: DataManifest, context: RankContext, folder: RunFolder) -> None:
        self._config, self._manifest, self._context, self._folder = config, manifest, context, folder
        self._writer = CheckpointWriter(in_background=config.training.async_checkpoints)
        self._saved_step: int | None = None

    def on_train_begin(self, trainer: Trainer) -> None:
        """Notes where the run goes on from: that state is on disk."""
        if trainer.position.step:
            self._saved_step = trainer.position.step

    def on_step_end(self, trainer: Trainer) -> None:
        """Saves where it is due."""
        step, length = trainer.position.step, trainer.length
        every = self._config.training.checkpoint_steps
        is_due = length.ends_epoch(step) if every is None else step % every == 0
        is_validated_epoch = length.ends_epoch(step, self._config.evaluation.eval_frequency)
        if (is_due or is_validated_epoch) and not trainer.is_last_step:
            self._save(trainer)

    def on_finish(self, trainer: Trainer) -> None:
        """Saves the last state, in case the process ends before the model is written."""
        self._save(trainer)
        self._settle()

    def on_stop(self, trainer: Trainer) -> None:
        """Saves the state that the next start goes on from.

        Raises:
            CheckpointError: It cannot be written: whoever stops the run must not be told that it is saved.
        """
        self._settle()
        self._save(trainer)
        self._writer.wait()

    def before_rollback(self, trainer: Trainer) -> None:
        """Lets the checkpoint that is being written come to its end: it may be the one to go back to."""
        self._settle()

    def on_rollback(self, trainer: Trainer) -> None:
        """Drops the checkpoints of steps that are made anew."""
        last = trainer.position.step
        if self._context.is_main:
            drop_checkpoints((step, path) for step, path in self._folder.checkpoints() if step > last)
        self._saved_step = last

    def on_end(self) -> None:
        """Lets a checkpoint come to its end where no other rank can keep this one waiting."""
        self._writer.close()

    def _save(self, trainer: Trainer) -> None:
        step = trainer.position.step
        if step == self._saved_step:
            return
        with trainer.pause():
            self._settle()
            self._saved_step = step
            manifest = self._describe(trainer)
            try:
                self._writer.save(
                    self._folder.checkpoint(step),
                    saved_tensors(trainer),
                    generator_state(self._context.device),
                    manifest,
                    self._prune,
                )
            except CheckpointError as error:
                self._bear(error)

    def _describe(self, trainer: Trainer) -> CheckpointManifest:
        return CheckpointManifest(
            position=trainer.read_position().model_copy(),
            config_hash=config_hash(self._config),
            config=self._config.model_dump(mode="json"),
            tokenizer_hash=self._manifest.tokenizer_hash,
            data_fingerprint=self._manifest.fingerprint,
            strategy=trainer.strategy.name,
            world_size=self._context.world_size,
            global_batch=trainer.length.global_batch,
            metrics={name: value for name, value in trainer.measured.items() if math.isfinite(value)},
        )

    def _prune(self) -> None:
        if self._context.is_main:
            prune(self._folder.checkpoints(), self._config.training)

    def _settle(self) -> None:
        """Waits for the checkpoint that is being written, if there is one."""
        try:
            self._writer.wait()
        except CheckpointError as error:
            self._bear(error)

    def _bear(self, error: CheckpointError) -> None:
        """What `training.on_save_failure` says to do."""
        self._saved_step = None
        if self._config.training.on_save_failure == "stop":
            raise error
        logger.warning("training goes on without a checkpoint: %s", error)


def saved_tensors(trainer: Trainer) -> dict[str, Any]:
    """Every tensor of a run's state, live: model, optimizer, loss scaler, average of the weights, losses."""
    state = trainer.strategy.state_dict()
    extra = {"scaler": trainer.scaler, "average": trainer.average, "spikes": trainer.spikes}
    return {**state, **{name: part.state_dict() for name, part in extra.items() if part is not None}}
