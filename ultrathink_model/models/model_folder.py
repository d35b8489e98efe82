"""A folder that is replaced as a whole: at every moment, also after a crash, one whole version of it is there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ultrathink_model.errors import CheckpointError


@contextmanager
def replaced_folder(folder: Path, size: int = 0) -> Iterator[Path]:
    """Gives an empty folder beside `folder` to write to, and puts it in its place when the block ends well.

    Everything is synced to disk before it gets its name. Where a folder stands already it steps aside under a name
    that `existing_folder` knows, until the new one has its place; where the block fails it is left as it was.

    Args:
        folder: The folder to replace or to make.
        size: Bytes that will be written, roughly.

    Raises:
        CheckpointError: There are fewer bytes free than that.
    """
    new, old = _beside(folder, "new"), _beside(folder, "old")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(new, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < size:
        raise CheckpointError(
            f"{folder} needs {size / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free there; "
            "free some, or set output.output_dir to another disk."
        )
    new.mkdir()
    try:
        yield new
        _sync_tree(new)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def existing_folder(folder: Path) -> Path:
    """The folder, or the version that stepped aside for one whose writing was cut short.

    Raises:
        CheckpointError: There is neither.
    """
    for candidate in (folder, _beside(folder, "old")):
        if candidate.is_dir():
            return candidate
    kind = "is a file, not a folder" if folder.exists() else "does not exist"
    raise CheckpointError(f"{folder} {kind}; name the final_model/ folder of a finished run.")


def _beside(folder: Path, version: str) -> Path:
    return folder.parent / f".{folder.name}.{version}"


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
