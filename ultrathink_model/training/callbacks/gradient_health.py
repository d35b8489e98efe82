"""A word of warning when the gradient's norm leaves the range of healthy training."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ultrathink_model.training.callbacks.callback import Callback
from ultrathink_model.training.callbacks.metrics import MetricsCallback

if TYPE_CHECKING:
    from ultrathink_model.training.trainer import Trainer

# Healthy norms lie between 0.1 and 10; beyond these something is wrong.
LEAST, MOST = 0.01, 100.0

logger = logging.getLogger(__name__)


class GradientHealthCallback(Callback):
    """Warns in the log at the first logged step of each excursion of `train/grad_norm`."""

    def __init__(self, metrics: MetricsCallback) -> None:
        self._metrics = metrics
        self._was_healthy = True

    def on_step_end(self, trainer: Trainer) -> None:
        """Looks at the norm that was logged last."""
        norm = self._metrics.last.get("train/grad_norm", 1.0)
        is_healthy = LEAST <= norm <= MOST
        if self._was_healthy and not is_healthy:
            remedy = (
                "raise training.learning_rate, or look whether the model learns at all"
                if norm < LEAST
                else "lower training.learning_rate or training.gradient_clipping"
            )
            logger.warning(
                "step %d: the gradient's norm is %.3g, and healthy training keeps between 0.1 and 10: %s",
                trainer.position.step,
                norm,
                remedy,
            )
        self._was_healthy = is_healthy
