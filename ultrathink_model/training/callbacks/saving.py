"""Checkpoints while training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ultrathink_model.config import Config, config_hash
from ultrathink_model.data import DataManifest
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training.callbacks.callback import Callback
from ultrathink_model.training.checkpoint import CheckpointManifest, keep_newest, save_checkpoint
from ultrathink_model.training.rng import generator_state

if TYPE_CHECKING:
    from ultrathink_model.training.trainer import Trainer


class SavingCallback(Callback):
    """Saves a checkpoint every `training.checkpoint_steps` steps, or at the ends of epochs where that is null.

    It saves too at the epochs that are validated, at the end, and when a signal stops the run. The newest
    `training.keep_checkpoints` are kept.
    """

    def __init__(self, config: Config, manifest: DataManifest, context: RankContext, folder: RunFolder) -> None:
        self._config, self._manifest, self._context, self._folder = config, manifest, context, folder
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

    def on_stop(self, trainer: Trainer) -> None:
        """Saves the state that the next start goes on from."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        step = trainer.position.step
        if step == self._saved_step:
            return
        with trainer.pause():
            manifest = CheckpointManifest(
                position=trainer.read_position().model_copy(),
                config_hash=config_hash(self._config),
                config=self._config.model_dump(mode="json"),
                tokenizer_hash=self._manifest.tokenizer_hash,
                data_fingerprint=self._manifest.fingerprint,
                strategy=trainer.strategy.name,
                world_size=self._context.world_size,
                global_batch=trainer.length.global_batch,
            )
            save_checkpoint(
                self._folder.checkpoint(step), saved_tensors(trainer), generator_state(self._context.device), manifest
            )
            if self._context.is_main:
                keep_newest(self._folder.checkpoints(), self._config.training.keep_checkpoints)
        self._saved_step = step


def saved_tensors(trainer: Trainer) -> dict[str, Any]:
    """Every tensor of a run's state, live: the model's, the optimizer's and the loss scaler's."""
    state = trainer.strategy.state_dict()
    return state if trainer.scaler is None else {**state, "scaler": trainer.scaler.state_dict()}
