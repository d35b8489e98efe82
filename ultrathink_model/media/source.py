"""The bytes of an image or a sound, from a file or from memory."""

import importlib
from pathlib import Path
from types import ModuleType

from ultrathink_model.errors import DependencyError, MediaError

MAX_BYTES = 2**28

MediaSource = bytes | str | Path
"""A file's content, or its path."""


def read_bytes(source: MediaSource) -> bytes:
    """The bytes that a source stands for.

    Raises:
        MediaError: There is no such file, it is no regular file, cannot be read, is empty or has over `MAX_BYTES`.
    """
    data = source if isinstance(source, bytes) else _read_file(Path(source))
    if not data:
        raise MediaError("medium has bytes", f"{describe(source)} is empty")
    if len(data) > MAX_BYTES:
        raise MediaError(f"medium has at most {MAX_BYTES >> 20} MiB", f"{describe(source)} has {len(data) >> 20} MiB")
    return data


def describe(source: MediaSource) -> str:
    """What a message calls the source."""
    return f"{len(source)} bytes" if isinstance(source, bytes) else str(source)


def require(package: str) -> ModuleType:
    """A package of the extra `multimodal`.

    Raises:
        DependencyError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"advanced.enable_multimodal=true needs the package {error.name}: pip install 'ultrathink-model[multimodal]', "
            "or set it to false."
        ) from None


def _read_file(path: Path) -> bytes:
    try:
        # A pipe or a device could be read for ever.
        if not path.is_file():
            raise MediaError("medium is a file", f"{path} is {'no regular file' if path.exists() else 'not there'}")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        # ValueError: a NUL within the path, to some versions.
        raise MediaError("medium is a file", f"{path!s:.200} cannot be read ({error})") from None
