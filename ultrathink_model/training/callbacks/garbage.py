"""Python's garbage, collected when the run says so."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from ultrathink_model.training.callbacks.callback import Callback

if TYPE_CHECKING:
    from ultrathink_model.training.trainer import Trainer


class GarbageCallback(Callback):
    """Collects garbage every so many steps, and at no other time.

    Left to itself Python collects on each rank at its own moment, and every rank then waits for each of them.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._was_enabled = gc.isenabled()

    def on_train_begin(self, trainer: Trainer) -> None:
        """Takes what is there out of the collector's sight, and takes its work over."""
        self._was_enabled = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()

    def on_step_end(self, trainer: Trainer) -> None:
        """Collects where it is due."""
        if trainer.position.step % self._steps == 0:
            gc.collect()

    def on_end(self) -> None:
        """Gives the work back to Python."""
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()
