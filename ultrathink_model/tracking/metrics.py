"""`metrics.jsonl`: one line of JSON for each logged step, and the spool that MLflow is fed from."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path


class MetricsWriter:
    """Appends lines to a metrics file; a line is in the file, whole, when `write` returns.

    A line is `{"step": …, "time": …, "<metric>": …}` with the time in seconds since 1970. Numbers that are not
    finite are written as null, because JSON has no other word for them.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_torn_line()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends the metrics of one optimizer step.

        Args:
            step: Optimizer steps done so far; not below that of the lines before.
            metrics: Number by MLflow's name, as in `{"tokens": 4096, "train/loss": 5.1}`.
        """
        values = {name: _finite(value) for name, value in metrics.items()}
        line = (json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                written = file.write(line)
            except OSError:
                file.truncate(end)
                raise
            if written != len(line):
                file.truncate(end)
                raise OSError(f"{self.path}: only {written} of {len(line)} bytes could be written; is the disk full?")

    def truncate_after(self, step: int) -> None:
        """Drops the lines of steps after `step`, in one atomic step: a resumed run writes them anew."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_bytes().splitlines(keepends=True) if json.loads(line)["step"] <= step]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_bytes(b"".join(kept))
        os.replace(temporary, self.path)

    def _drop_torn_line(self) -> None:
        """Cuts off a last line that a killed process or a full disk left without its end."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.path.open("r+b") as file:
                file.truncate(whole)


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The lines of a metrics file in order, without a torn last line; [] where there is no file.

    Each line holds `step` and `time`; a metric that was not finite at a step is missing from its line.
    """
    return [row for row, _ in read_spool(Path(path), 0)]


def read_spool(path: Path, offset: int) -> Iterator[tuple[dict[str, float], int]]:
    """The whole lines of a metrics file from byte `offset` on, each with the offset of its end."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield {name: value for name, value in json.loads(line).items() if value is not None}, offset


def _finite(value: float) -> float | None:
    """The value as JSON can hold it: whole numbers stay whole, what is not finite becomes None."""
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
