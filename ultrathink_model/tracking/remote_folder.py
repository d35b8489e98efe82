"""A run's folder kept in a remote store as well: s3://, gs://, another disk, whatever fsspec reaches.

A machine that is taken away leaves its disk behind. What stands here is copied while the run goes on: a checkpoint
once it is whole, its manifest last, so that what is cut short is no checkpoint there either.
"""

import logging
import posixpath
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ultrathink_model.config import Config
from ultrathink_model.errors import CheckpointError, ConfigError, DependencyError
from ultrathink_model.tracking.run_folder import CHECKPOINT_NAME, RunFolder, RunRecord

SYNC_SECONDS = 10.0
CHECKPOINT_MANIFEST = "manifest.json"
PREVIOUS = "previous"

logger = logging.getLogger(__name__)


class RemoteFolder:
    """A folder in a remote store.

    Attributes:
        uri: Its address.
    """

    def __init__(self, uri: str) -> None:
        """Opens the store; nothing is asked of it yet.

        Raises:
            ConfigError: No store has such an address.
            DependencyError: The package that speaks to the store is not installed.
        """
        import fsspec  # noqa: PLC0415 - only where there is a remote store

        self.uri = uri.rstrip("/")
        try:
            self._store, self._path = fsspec.core.url_to_fs(self.uri)
        except ImportError as error:
            raise DependencyError(f"output.remote_dir={uri}: {error}. `make cloud` sets such packages up.") from None
        except ValueError as error:
            raise ConfigError(f"output.remote_dir={uri}: {error}; take s3://…, gs://… or a folder.") from None
        self._is_local = "file" in (self._store.protocol if isinstance(self._store.protocol, tuple) else ())

    def names(self) -> dict[str, int]:
        """Size of every file in it, by its name from here; empty where there is no such folder."""
        self._store.invalidate_cache()
        try:
            found: dict[str, Any] = self._store.find(self._path, detail=True)
        except FileNotFoundError:
            return {}
        return {posixpath.relpath(path, self._path): int(entry["size"] or 0) for path, entry in found.items()}

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is none."""
        self._store.invalidate_cache()
        try:
            content: bytes = self._store.cat_file(self._address(name))
        except FileNotFoundError:
            return None
        return content

    def put(self, file: Path, name: str) -> None:
        """Copies a file there; a reader sees the old content or the new, whole."""
        address = self._address(name)
        if not self._is_local:  # an object appears when it is whole
            self._store.put_file(str(file), address)
            return
        temporary = posixpath.join(posixpath.dirname(address), f".{posixpath.basename(address)}.tmp")
        self._store.makedirs(posixpath.dirname(address), exist_ok=True)
        self._store.put_file(str(file), temporary)
        self._store.mv(temporary, address)

    def get(self, name: str, file: Path) -> None:
        """Copies a file from there, whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.tmp")
        self._store.get_file(self._address(name), str(temporary))
        temporary.replace(file)

    def delete(self, name: str) -> None:
        """Deletes a file or a folder."""
        self._store.rm(self._address(name), recursive=True)

    def _address(self, name: str) -> str:
        return posixpath.join(self._path, name)


def upload(folder: Path, uri: str, names: Iterable[str] | None = None) -> None:
    """Copies what a folder holds, less hidden files, into a remote one; nothing is deleted there.

    Args:
        folder: What to copy.
        uri: Where to.
        names: The files and folders in it to copy; None copies all.

    Raises:
        CheckpointError: The store refuses.
    """
    remote = RemoteFolder(uri)
    with _refusals(remote):
        wanted = None if names is None else tuple(names)
        for name, file in sorted(_visible_files(folder).items()):
            if wanted is None or name in wanted or name.startswith(tuple(f"{folder}/" for folder in wanted)):
                remote.put(file, name)


def download(uri: str, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Copies the files of a remote folder whose names are wanted into a local one; equal sizes are not copied again.

    Raises:
        CheckpointError: The store refuses, or holds nothing there.
    """
    remote = RemoteFolder(uri)
    with _refusals(remote):
        names = remote.names()
        if not names:
            raise CheckpointError(f"{uri} holds nothing; the step that makes it must run first.")
        for name, size in names.items():
            file = folder / name
            if wanted(name) and not (file.is_file() and file.stat().st_size == size):
                remote.get(name, file)


def without_checkpoints(name: str) -> bool:
    """Whether a file of a run's folder is wanted by who does not go on training: no checkpoint, no earlier run."""
    first = name.split("/", 1)[0]
    return not CHECKPOINT_NAME.fullmatch(first) and first != PREVIOUS


def fetch_run(config: Config) -> None:
    """Brings a run's folder from its remote copy where that is ahead of this machine's; else does nothing.

    Raises:
        CheckpointError: The store refuses.
    """
    if config.output.remote_dir is None:
        return
    folder, remote = RunFolder(config.output.output_dir), RemoteFolder(config.output.remote_dir)
    with _refusals(remote):
        known = remote.read("run.json")
        if known is None:
            return
        there, here = RunRecord.model_validate_json(known), folder.record()
        if here is not None and here.updated_at >= there.updated_at:
            return
        logger.info("the run's folder is fetched from %s", remote.uri)
        names = sorted(remote.names(), key=lambda name: name == "run.json")  # last: it says that the rest is there
        for name in names:
            # Of earlier runs only what takes their names, so that this one's files are not moved over theirs.
            if not name.startswith(f"{PREVIOUS}/") or name.endswith("/run.json"):
                remote.get(name, folder.path / name)


@contextmanager
def mirrored(config: Config) -> Iterator[None]:
    """Fetches a run's folder first, keeps its remote copy up to date while the block runs, and at its end.

    Raises:
        CheckpointError: The store refuses at the beginning or at the end; in between it is tried again.
    """
    if config.output.remote_dir is None:
        yield
        return
    fetch_run(config)
    mirror = Mirror(RunFolder(config.output.output_dir), RemoteFolder(config.output.remote_dir))
    with mirror:
        yield


class Mirror:
    """Copies what changes in a run's folder to its remote copy. A context manager: a thread copies while it is open.

    The copy at the end, also after an error or a signal, is of everything.
    """

    def __init__(self, folder: RunFolder, remote: RemoteFolder) -> None:
        self._folder, self._remote = folder, remote
        self._sent: dict[str, tuple[int, int]] = {}
        self._others: set[str] = set()
        self._there = self._known_checkpoints()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="remote-folder", daemon=True)

    def __enter__(self) -> "Mirror":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        with _refusals(self._remote):
            self.sync()

    def sync(self) -> None:
        """Copies what is new or changed, and deletes the checkpoints there that are no more here."""
        files = _visible_files(self._folder.path)
        checkpoints = {path.name for _, path in self._folder.checkpoints() if (path / CHECKPOINT_MANIFEST).is_file()}
        for name in sorted(files, key=_order):
            first = name.split("/", 1)[0]
            if CHECKPOINT_NAME.fullmatch(first) and first not in checkpoints:
                continue
            self._send(name, files[name])
        self._drop_checkpoints({path.name for _, path in self._folder.checkpoints()})

    def _send(self, name: str, file: Path) -> None:
        try:
            status = file.stat()
            mark = (status.st_size, status.st_mtime_ns)
            if self._sent.get(name) == mark or name.split("/", 1)[0] in self._there:
                return
            self._remote.put(file, name)
        except FileNotFoundError:
            return  # deleted meanwhile, as old checkpoints are
        self._sent[name] = mark

    def _known_checkpoints(self) -> set[str]:
        """The checkpoints there that are those here; others of the same names are deleted there."""
        names = self._remote.names()
        checkpoints = {first for name in names if CHECKPOINT_NAME.fullmatch(first := name.split("/", 1)[0])}
        known = set()
        for name in checkpoints:
            here = self._folder.path / name / CHECKPOINT_MANIFEST
            if here.is_file() and self._remote.read(f"{name}/{CHECKPOINT_MANIFEST}") == here.read_bytes():
                known.add(name)
            elif here.is_file():
                self._delete_checkpoint(name, names)
        self._others = checkpoints - known
        return known

    def _drop_checkpoints(self, kept: set[str]) -> None:
        sent = {first for name in self._sent if CHECKPOINT_NAME.fullmatch(first := name.split("/", 1)[0])}
        for name in sorted((self._there | self._others | sent) - kept):
            self._delete_checkpoint(name, self._remote.names())
            self._there.discard(name)
            self._others.discard(name)
            self._sent = {known: mark for known, mark in self._sent.items() if not known.startswith(f"{name}/")}

    def _delete_checkpoint(self, name: str, names: Iterable[str]) -> None:
        manifest = f"{name}/{CHECKPOINT_MANIFEST}"
        if manifest in names:
            self._remote.delete(manifest)  # first: a cut deletion leaves no checkpoint
        if any(known.startswith(f"{name}/") and known != manifest for known in names):
            self._remote.delete(name)

    def _watch(self) -> None:
        while not self._end.wait(SYNC_SECONDS):
            try:
                self.sync()
            except Exception as error:  # noqa: BLE001 - stores fail in ways of their own; the next round tries again
                logger.warning("%s is not up to date: %s", self._remote.uri, error)


def _visible_files(folder: Path) -> dict[str, Path]:
    """The files of a folder by their names from there, less what is hidden."""
    files = {}
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in parts):
            files[path.relative_to(folder).as_posix()] = path
    return files


def _order(name: str) -> tuple[int, str]:
    """Tensors before manifests, and last what says that the run is there."""
    return (2 if name == "run.json" else 1 if name.endswith(f"/{CHECKPOINT_MANIFEST}") else 0, name)


@contextmanager
def _refusals(remote: RemoteFolder) -> Iterator[None]:
    """Says what a store's refusal means to the user."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"output.remote_dir={remote.uri} cannot be read or written: {type(error).__name__}: {error}. What is on "
            "this machine's disk is whole; mend the address or the credentials, and start the same command again."
        ) from error
