"""A profile of some steps: where the time and the memory go."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from ultrathink_model.distributed.context import RankContext
from ultrathink_model.training.callbacks.callback import Callback

if TYPE_CHECKING:
    from ultrathink_model.training.trainer import Trainer

ROWS = 40

logger = logging.getLogger(__name__)


class ProfilingCallback(Callback):
    """Records the steps of `logging.profile_steps` on each rank.

    It leaves in `profile/`: `trace_rank<n>.json`, for Perfetto or Chrome's tracing; `operators_rank<n>.txt`, the
    operators by their time and memory; on a GPU `memory_rank<n>.pickle`, for https://pytorch.org/memory_viz.
    """

    def __init__(self, steps: Sequence[int], folder: Path, context: RankContext) -> None:
        self._first, self._last = steps
        self._folder, self._context = folder, context
        self._profile: profile | None = None

    def on_train_begin(self, trainer: Trainer) -> None:
        """Begins, where the next step is the first to be recorded."""
        self._begin_before(trainer.position.step + 1)

    def on_step_end(self, trainer: Trainer) -> None:
        """Begins or ends, where it is due."""
        step = trainer.position.step
        if self._profile is not None and (step >= self._last or trainer.is_last_step):
            self._write()
        self._begin_before(step + 1)

    def on_end(self) -> None:
        """Stops the recording of a run that ended within it."""
        if self._profile is not None:
            self._write()

    def _begin_before(self, step: int) -> None:
        if step != self._first or self._profile is not None:
            return
        activities = [ProfilerActivity.CPU]
        if self._context.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history()
        self._profile = profile(activities=activities, profile_memory=True, record_shapes=True)
        self._profile.start()

    def _write(self) -> None:
        assert self._profile is not None
        finished, self._profile = self._profile, None
        finished.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        rank = self._context.rank
        finished.export_chrome_trace(str(self._folder / f"trace_rank{rank}.json"))
        on_gpu = self._context.device.type == "cuda"
        table = finished.key_averages().table(sort_by=f"self_{'cuda' if on_gpu else 'cpu'}_time_total", row_limit=ROWS)
        (self._folder / f"operators_rank{rank}.txt").write_text(table, encoding="utf-8")
        if on_gpu:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"memory_rank{rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        logger.info("wrote the profile of steps %d to %d to %s", self._first, self._last, self._folder)
