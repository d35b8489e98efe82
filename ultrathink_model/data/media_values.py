"""The images and sounds that a row names, as they stand in its columns `images` and `audio`."""

from collections.abc import Mapping
from pathlib import Path

from ultrathink_model.errors import MediaError
from ultrathink_model.media.placeholders import Kind

COLUMNS: dict[Kind, str] = {"image": "images", "audio": "audio"}
WITHIN_FOLDER = "medium lies within the dataset's folder"


def media_values(value: object) -> list[str | bytes] | None:
    """The paths and bytes of a column's value; None where it is anything else.

    A lone value is a list of one, nothing at all is an empty list. `datasets` keeps a medium as {"bytes", "path"}, of
    which the bytes count where there are any.
    """
    if value is None:
        return []
    parts = [_medium(part) for part in value] if isinstance(value, list | tuple) else [_medium(value)]
    known = [part for part in parts if part is not None]
    return known if len(known) == len(parts) else None


def _medium(value: object) -> str | bytes | None:
    if isinstance(value, Mapping):
        return _medium(value.get("bytes") or value.get("path"))
    return value if isinstance(value, str | bytes) and value else None


def find_medium(path: str, folder: Path | None, file: str) -> Path:
    """The file that a row's path means, which is looked for from the folder of the row's own file.

    Args:
        path: As it stands in the row.
        folder: The dataset's folder; None for a dataset that has none.
        file: Name of the row's file within the dataset's folder.

    Raises:
        MediaError: It lies outside the dataset's folder, links and `..` followed, or there is no folder.
    """
    if folder is None:
        raise MediaError("medium is bytes", f"{path:.200} is a path, and the dataset is no local folder")
    try:
        home, found = folder.resolve(), (folder / Path(file).parent / path).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        # RuntimeError: a loop of links; ValueError: a NUL.
        raise MediaError("medium is a file", f"{path!r:.200} cannot be looked for ({error})") from None
    if not found.is_relative_to(home):
        raise MediaError(WITHIN_FOLDER, f"{path:.200} leads to {found}")
    return found
