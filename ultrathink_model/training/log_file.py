"""The log of a run: what the package says, in the run's folder."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def log_to_file(path: Path, level: str) -> Iterator[None]:
    """Appends what the package logs at `level` or above to a file, while it is open.

    Args:
        path: The file, as `training.log` in a run's folder.
        level: `logging.log_level`.
    """
    package = logging.getLogger("ultrathink_model")
    before = package.level
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT))
    package.addHandler(handler)
    package.setLevel(level)
    try:
        yield
    finally:
        package.setLevel(before)
        package.removeHandler(handler)
        handler.close()
