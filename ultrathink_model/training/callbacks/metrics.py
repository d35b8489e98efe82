"""Logging: the step's figures to `metrics.jsonl` and to the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ultrathink_model.distributed.context import all_reduce_sum
from ultrathink_model.tracking.metrics import MetricsWriter
from ultrathink_model.tracking.progress import Progress
from ultrathink_model.training.callbacks.callback import Callback

if TYPE_CHECKING:
    from ultrathink_model.training.trainer import Trainer

PATHS = ("fast", "standard", "deep", "ultra_deep")


class MetricsCallback(Callback):
    """Writes a line at the first step, every `logging.log_steps` steps and at the end.

    Other callbacks that come before it put their figures into `extra`, which makes a line of any step. `train/loss`
    is that step's own mean over the global batch; speed is the mean since the line before.
    """

    def __init__(self, log_steps: int, writer: MetricsWriter | None, progress: Progress | None) -> None:
        """Prepares the callback.

        Args:
            log_steps: Steps between lines.
            writer: Where lines go; None on all ranks but the first.
            progress: The terminal; None on all ranks but the first.
        """
        self.extra: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._log_steps = log_steps
        self._writer, self._progress = writer, progress
        self._logged_step = 0
        self._logged_tokens = 0
        self._logged_clock = 0.0

    def on_train_begin(self, trainer: Trainer) -> None:
        """Begins to measure the speed."""
        self._write(trainer)
        self._note_line(trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        """Writes a line where one is due."""
        step = trainer.position.step
        if step % self._log_steps == 0 or step == 1 or trainer.is_last_step:
            self._measure(trainer)
        if not trainer.is_last_step:
            # The last step's line waits for the last evaluation.
            self._write(trainer)
        if self._progress:
            self._progress.update(step, self.last.get("train/loss"), self.last.get("train/tokens_per_second"))

    def on_finish(self, trainer: Trainer) -> None:
        """Writes the last line."""
        if trainer.position.step > self._logged_step:
            self._measure(trainer)
        self._write(trainer)

    def on_stop(self, trainer: Trainer) -> None:
        """Writes what the last step measured, so that no figure is lost with the process."""
        self._write(trainer)

    def _measure(self, trainer: Trainer) -> None:
        record = trainer.record
        assert record is not None
        assert record.gradient_norm is not None
        names = ["loss", *(f"aux/{name}" for name in sorted(record.aux_sums))]
        sums = [record.loss_sum, *(record.aux_sums[name] for name in sorted(record.aux_sums))]
        totals = all_reduce_sum(torch.stack([value.double() for value in sums])).tolist()
        position = trainer.read_position()
        steps = position.step - self._logged_step
        seconds = max(1e-9, trainer.training_clock - self._logged_clock)
        self.extra |= {f"train/{name}": total / max(1, record.tokens) for name, total in zip(names, totals, strict=True)}
        self.extra |= {
            "train/learning_rate": record.learning_rate,
            "train/grad_norm": float(record.gradient_norm),
            "train/tokens_per_second": (position.tokens - self._logged_tokens) / seconds,
            "train/step_seconds": seconds / steps,
            "train/bad_steps": position.bad_steps,
        }
        self.extra |= routing_metrics(trainer.model.routing_statistics())
        self._note_line(trainer)

    def _note_line(self, trainer: Trainer) -> None:
        self._logged_step, self._logged_tokens = trainer.position.step, trainer.position.tokens
        self._logged_clock = trainer.training_clock

    def _write(self, trainer: Trainer) -> None:
        if self.extra and self._writer:
            self._writer.write(trainer.position.step, {"tokens": trainer.position.tokens, **self.extra})
        self.last |= self.extra
        self.extra.clear()


def routing_metrics(statistics: dict[str, Tensor]) -> dict[str, float]:
    """The figures of a step's routing that make curves; `routing.json` holds the tables.

    Args:
        statistics: What the model's `routing_statistics` returned.
    """
    metrics = {f"train/{name}": float(value) for name, value in statistics.items() if value.numel() == 1}
    if "moe/load" in statistics:
        load = statistics["moe/load"]  # (mixture layers, experts)
        metrics["train/moe/max_load"] = float(load.max()) * load.shape[-1]
    if "dre/paths" in statistics:
        shares = statistics["dre/paths"].mean(dim=0)  # (paths,)
        metrics |= {f"train/dre/path/{path}": float(share) for path, share in zip(PATHS, shares, strict=True)}
    return metrics
