"""The terminal: one live line where there is a terminal, plain lines where there is none."""

import datetime
import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Shows stage n of m, step, loss, tokens per second and time left.

    A context manager. On a terminal it keeps one line up to date; elsewhere it prints a line every `log_steps`
    steps. Only rank 0 should make one.
    """

    def __init__(
        self,
        name: str,
        total_steps: int | None,
        *,
        log_steps: int,
        stage: int = 1,
        stages: int = 1,
        first_step: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        """Prepares the display.

        Args:
            name: What the stage does, as in `pretrain`.
            total_steps: Optimizer steps after which the stage ends; None where something else ends it.
            log_steps: Steps between plain lines.
            stage: Number of this stage, from 1.
            stages: Number of stages in the pipeline.
            first_step: Steps that were done before this start; they do not count towards the speed.
            stream: Where to write; standard output by default.
        """
        self._title = f"stage {stage}/{stages} {name}" if stages > 1 else name
        self._total = total_steps
        self._log_steps = log_steps
        # Step and time of the first update: what comes before it, a validation for one, is no measure of the speed.
        self._first_update: tuple[int, float] | None = None
        self._stream = stream or sys.stdout
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        self._next_line = first_step + 1
        if self._stream.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[line]}", markup=False),
                console=Console(file=self._stream),
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(self._title, total=total_steps, completed=first_step, line="")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """Shows the state after optimizer step `step`.

        Args:
            step: Steps done, those before this start included.
            loss: Training loss in nats per token.
            tokens_per_second: Throughput over all ranks.
        """
        is_last = step == self._total
        self._first_update = self._first_update or (step, time.monotonic())
        if self._bar:
            line = self._describe(step, loss, tokens_per_second)
            self._bar.update(self._task, completed=step, line=line, refresh=is_last)
        elif step >= self._next_line or is_last:
            # Lines fall on whole multiples of log_steps, where metrics.jsonl has its lines too.
            self._next_line = (step // self._log_steps + 1) * self._log_steps
            self._print(f"{self._title}: {self._describe(step, loss, tokens_per_second)}")

    def message(self, text: str) -> None:
        """Prints a line of its own, above the live line where there is one."""
        if self._bar:
            self._bar.console.print(f"{self._title}: {text}", markup=False, highlight=False)
        else:
            self._print(f"{self._title}: {text}")

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _describe(self, step: int, loss: float | None, tokens_per_second: float | None) -> str:
        parts = [f"step {step:,}" if self._total is None else f"step {step:,}/{self._total:,}"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if tokens_per_second is not None:
            parts.append(f"{tokens_per_second:,.0f} tokens/s")
        seconds_left = self._seconds_left(step)
        if seconds_left is not None:
            parts.append(f"{datetime.timedelta(seconds=round(seconds_left))} left")
        return ", ".join(parts)

    def _seconds_left(self, step: int) -> float | None:
        """Steps to come at the mean speed since the first update of this start; None before the second."""
        if self._total is None or self._first_update is None:
            return None
        first_step, started = self._first_update
        if step == first_step:
            return None
        return (self._total - step) * (time.monotonic() - started) / (step - first_step)
