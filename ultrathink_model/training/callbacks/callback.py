"""The base of all callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ultrathink_model.training.trainer import Trainer


class Callback:
    """Something that is done around the steps of training. Every rank calls the same callbacks in the same order."""

    def on_train_begin(self, trainer: Trainer) -> None:
        """Before the first step of this start."""

    def on_step_end(self, trainer: Trainer) -> None:
        """After each step."""

    def on_finish(self, trainer: Trainer) -> None:
        """After the last step of the run."""

    def on_stop(self, trainer: Trainer) -> None:
        """After the step at which a signal stopped the run, which a later start will go on from."""

    def before_rollback(self, trainer: Trainer) -> None:
        """Before the run goes back to its last good checkpoint; what reads or writes checkpoints must come to rest."""

    def on_rollback(self, trainer: Trainer) -> None:
        """After the run went back: what came after the trainer's position never was."""

    def on_end(self) -> None:
        """When training is over in whatever way, an error too: what the callback changed in the process is undone."""
