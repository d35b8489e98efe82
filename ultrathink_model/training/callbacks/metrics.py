"""Logging: the step's figures to `metrics.jsonl` and to the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ultrathink_model.tracking.metrics import MetricsWriter
from ultrathink_model.tracking.progress import Progress
from ultrathink_model.training.callbacks.callback import Callback
from ultrathink_model.training.callbacks.routing import routing_metrics

if TYPE_CHECKING:
    from ultrathink_model.training.trainer import Trainer


class MetricsCallback(Callback):
    """Writes a line at the first step, every `logging.log_steps` steps and at the end.

    Other callbacks that come before it put their figures into `extra`, which makes a line of any step. `train/loss`
    is that step's own mean over the global batch; speed is the mean since the line before.

    Attributes:
        extra: Figures of the step that other callbacks add.
        last: What was measured last.
        writer: Where lines go; None on all ranks but the first.
        progress: The terminal; None on all ranks but the first.
    """

    def __init__(self, log_steps: int) -> None:
        """Prepares the callback.

        Args:
            log_steps: Steps between lines.
        """
        self.extra: dict[str, float] = {}
        self.writer: MetricsWriter | None = None
        self.progress: Progress | None = None
        self.last: dict[str, float] = {}
        self._log_steps = log_steps
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
        if self.progress:
            self.progress.update(step, self.last.get("train/loss"), self.last.get("train/tokens_per_second"))

    def on_finish(self, trainer: Trainer) -> None:
        """Writes the last line."""
        if trainer.position.step > self._logged_step:
            self._measure(trainer)
        self._write(trainer)

    def on_stop(self, trainer: Trainer) -> None:
        """Writes what the last step measured, so that no figure is lost with the process."""
        self._write(trainer)

    def on_rollback(self, trainer: Trainer) -> None:
        """Drops the lines of the steps that are made anew."""
        self.extra.clear()
        if self.writer:
            self.writer.truncate_after(trainer.position.step)
        self._note_line(trainer)

    def _measure(self, trainer: Trainer) -> None:
        record = trainer.record
        assert record is not None
        assert record.gradient_norm is not None
        aux_names = _names_of_all_ranks(record.aux_sums)
        names = ["loss", *(f"aux/{name}" for name in aux_names)]
        sums = [record.loss_sum, *(record.aux_sums.get(name, torch.zeros_like(record.loss_sum)) for name in aux_names)]
        totals = trainer.strategy.context.sum_over_data(torch.stack([value.double() for value in sums])).tolist()
        position = trainer.read_position()
        steps = position.step - self._logged_step
        seconds = max(1e-9, trainer.training_clock - self._logged_clock)
        self.extra |= {
            f"train/{name}": total / max(1, record.tokens) for name, total in zip(names, totals, strict=True)
        }
        self.extra |= {
            "train/learning_rate": record.learning_rate,
            "train/grad_norm": float(record.gradient_norm),
            "train/tokens_per_second": (position.tokens - self._logged_tokens) / seconds,
            "train/step_seconds": seconds / steps,
            "train/bad_steps": position.bad_steps,
        }
        if position.rollbacks:
            self.extra["train/rollbacks"] = position.rollbacks
        if trainer.throughput is not None:
            self.extra["train/mfu"] = trainer.throughput.utilisation(self.extra["train/tokens_per_second"])
        self.extra |= routing_metrics(trainer.model.routing_statistics())
        self.last = dict(self.extra)
        self._note_line(trainer)

    def _note_line(self, trainer: Trainer) -> None:
        self._logged_step, self._logged_tokens = trainer.position.step, trainer.position.tokens
        self._logged_clock = trainer.training_clock

    def _write(self, trainer: Trainer) -> None:
        trainer.measured |= self.extra
        if self.extra and self.writer:
            self.writer.write(trainer.position.step, {"tokens": trainer.position.tokens, **self.extra})
        self.extra.clear()


def _names_of_all_ranks(names: Iterable[str]) -> list[str]:
    """The names that any rank has: a loss on tagged sources is only where there are such."""
    if not dist.is_initialized():
        return sorted(names)
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(names))
    return sorted(set().union(*gathered))
