"""Local sources: a file, a folder or a glob of text, Markdown, JSON Lines, CSV and Parquet."""

import glob
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ultrathink_model.data.articles import join_articles
from ultrathink_model.data.compression import COMPRESSIONS, format_suffix
from ultrathink_model.data.document import BadRow, Row
from ultrathink_model.data.file_formats import READERS
from ultrathink_model.data.file_hashes import FileHashes
from ultrathink_model.data.manifest import Split
from ultrathink_model.data.media_values import COLUMNS, find_medium, media_values
from ultrathink_model.errors import DataError, MediaError

WITHIN_FOLDER = "file lies within the folder"

logger = logging.getLogger(__name__)

SPLIT_WORDS = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of a source, and its name within the source."""

    path: Path
    name: str
    leaves_folder: bool = False
    """Whether it is a link to somewhere outside the folder that was named: not read, and a bad row."""


class LocalSource:
    """The documents of local files, sorted by file name.

    Where some files are named `train…` and others `valid…`, `val…` or `dev…`, they are the splits, and files named
    `test…` are left out; elsewhere the files are one pool from which documents are held out.

    Args:
        name: The source's name in messages.
        files: What `find_files` found.
        text_column: Column of the text in JSON Lines, CSV and Parquet.
        article_heading: As in `KnownDataset`: the line that opens an article, where rows or files are lines.
        hashes: Where file hashes are remembered.
        media: Whether the images and sounds that rows name count.
    """

    licence = "not stated (local files)"
    streaming = False

    def __init__(
        self,
        name: str,
        files: list[LocalFile],
        text_column: str,
        hashes: FileHashes,
        article_heading: str | None = None,
        media: bool = False,
    ) -> None:
        self.name = name
        # A file's name is its path within the folder.
        self.folder = files[0].path.parents[files[0].name.count("/")]
        self._media = media
        self._text_column, self._hashes, self._article_heading = text_column, hashes, article_heading
        named: dict[str, list[LocalFile]] = {}
        for file in files:
            named.setdefault(_split_word(file), []).append(file)
        self.has_validation = "train" in named and "validation" in named
        self._files: dict[Split, list[LocalFile]] = {"train": files}
        if self.has_validation:
            self._files = {"train": named["train"], "validation": named["validation"]}
            left_out = [file.name for word, some in named.items() if word not in self._files for file in some]
            if left_out:
                logger.info("%s has files for each split; left out: %s", name, ", ".join(left_out))

    def identity(self) -> dict[str, object]:
        """What the fingerprint covers: each split's file names and contents, and the text's column."""
        listing = {split: [(file.name, self._hash(file)) for file in files] for split, files in self._files.items()}
        media = self._media_identity()
        self._hashes.save()
        digest = hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()
        count = sum(len(files) for files in self._files.values())
        return {
            "kind": "local",
            "files": count,
            "sha256": digest,
            "text_column": self._text_column,
            "article_heading": self._article_heading,
        } | media

    def _media_identity(self) -> dict[str, object]:
        """What stands for the files that rows name: they may be others while the rows are the same."""
        if not self._media:
            return {}
        digest, count = hashlib.sha256(), 0
        for row in itertools.chain.from_iterable(map(self.rows, self._files)):
            columns = () if isinstance(row, BadRow) else (getattr(row, column) for column in COLUMNS.values())
            for value in (part for column in columns for part in media_values(column) or () if isinstance(part, str)):
                count += 1
                digest.update(f"{value}\0{self._hash_medium(value, row.file)}\n".encode())
        return {"media_files": count, "media_sha256": digest.hexdigest()}

    def _hash_medium(self, value: str, file: str) -> str:
        try:
            path = find_medium(value, self.folder, file)
            return self._hashes.hash(path) if path.is_file() else "missing"
        except (MediaError, OSError, ValueError):
            # Its row will be quarantined with the reason.
            return "unusable"

    def rows(self, split: Split) -> Iterator[Row | BadRow]:
        """The rows of the split's files, file by file."""
        for file in self._files[split]:
            if file.leaves_folder:
                yield BadRow(file.name, 0, WITHIN_FOLDER, f"link to {file.path.resolve()}")
                continue
            rows = READERS[format_suffix(file.path)](file.path, file.name, self._text_column, self._media)
            yield from rows if self._article_heading is None else join_articles(rows, self._article_heading)

    def _hash(self, file: LocalFile) -> str:
        if file.leaves_folder:
            return WITHIN_FOLDER
        try:
            return self._hashes.hash(file.path)
        except OSError as error:
            raise DataError(f"{file.path}: {error.strerror}; name a file that can be read.") from None


def find_files(name: str, within: str | None = None) -> list[LocalFile]:
    """The readable files that a path or glob stands for, sorted by name.

    Args:
        name: The path or glob.
        within: Folder that links may lead to; None takes the named folder itself. A file that is named alone may be
            anywhere.

    Raises:
        DataError: Nothing is there, or nothing of a known format.
    """
    path = Path(name).expanduser()
    formats = ", ".join(READERS)
    if path.is_file():
        if format_suffix(path) not in READERS:
            raise DataError(
                f"data.dataset={name}: the format {path.suffix or '(no suffix)'} is not among {formats} (each also with "
                f"{' or '.join(COMPRESSIONS)}); rename or convert the file."
            )
        return [LocalFile(path, path.name)]
    if path.is_dir():
        root, found = path, [file for file in path.rglob("*") if _is_visible(file.relative_to(path))]
    else:
        pattern = str(path)
        found = [Path(match) for match in glob.glob(pattern, recursive=True)]
        root = Path(re.split(r"[*?\[]", pattern, maxsplit=1)[0] or ".")
        root = root if root.is_dir() else root.parent
    files = [file for file in found if file.is_file() or _is_folder_link(file)]
    if not files:
        raise DataError(f"data.dataset={name}: there is no such file or folder, or it is empty; correct the path.")
    known = [file for file in files if format_suffix(file) in READERS or _is_folder_link(file)]
    if not known:
        raise DataError(f"data.dataset={name}: none of its {len(files)} files is of a known format ({formats}).")
    if len(known) < len(files):
        logger.info("%s: %d files of other formats than %s are not read", name, len(files) - len(known), formats)
    home = (root if within is None else Path(within)).resolve()
    listed = [
        LocalFile(file, file.relative_to(root).as_posix(), leaves_folder=_leaves(file, home))
        for file in known
        # A link to a folder within is not followed: what it shows is found in its own place.
        if not _is_folder_link(file) or _leaves(file, home)
    ]
    return sorted(listed, key=lambda file: file.name)


def _is_folder_link(path: Path) -> bool:
    return path.is_symlink() and path.is_dir()


def _leaves(path: Path, home: Path) -> bool:
    return path.is_symlink() and not path.resolve().is_relative_to(home)


def looks_like_path(name: str) -> bool:
    """Whether a name can only be meant as a path: it is there, or is spelled as no hub id is."""
    return (
        Path(name).expanduser().exists()
        or bool(re.search(r"[*?\[\\]", name))
        or name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or format_suffix(Path(name)) in READERS
    )


def _split_word(file: LocalFile) -> str:
    word = re.split(r"[^a-z]", Path(file.name).name.lower(), maxsplit=1)[0]
    return SPLIT_WORDS.get(word, "")


def _is_visible(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)
