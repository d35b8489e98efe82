"""Checkpoints: sharded folders that are whole or not there, and that are read without a pickle.

A checkpoint is a folder `checkpoint_<step>.pt/` of torch.distributed.checkpoint. Its tensors lie in safetensors
files, one or more for each rank, which load into any number of ranks; `rank_<n>.json` holds each rank's
generators; `manifest.json` holds the size and SHA-256 of all of them and what the run was. DCP's usual format
keeps its index in a pickle; its safetensors format keeps it in the files' headers.

It is written into a temporary folder, synced to disk and renamed, in that order, so that whatever stands under the
final name was whole when it got it. The manifest tells afterwards whether it still is.
"""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from ultrathink_model.errors import CheckpointError

MANIFEST = "manifest.json"
# A file of tensors is put together in memory before it is written, so its size bounds the copy.
FILE_BYTES = 1 << 30
# Headers, generators, the manifest and the file system's own needs beside the tensors.
SPARE_BYTES = 16 << 20

logger = logging.getLogger(__name__)


class FileRecord(BaseModel):
    """What a file of a checkpoint must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


class RunPosition(BaseModel):
    """How far a run is.

    Attributes:
        step: Optimizer steps finished, those that were skipped as bad among them.
        tokens: Tokens trained on, over all ranks.
        seconds: Seconds of training, over all starts.
        bad_steps: Steps that were skipped because a loss or gradient was not finite, or a spike.
        bad_steps_in_row: Those of them since the last good step.
        rollbacks: Times that the run went back to a checkpoint after too many of them in a row.
        batches_passed_over: Steps' worth of data that were left out at rollbacks.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bad_steps: int = 0
    bad_steps_in_row: int = 0
    rollbacks: int = 0
    batches_passed_over: int = 0

    @property
    def data_step(self) -> int:
        """The step of the data that comes next: ahead of `step` after a rollback."""
        return self.step + self.batches_passed_over


class CheckpointManifest(BaseModel):
    """The content of `manifest.json`."""

    model_config = ConfigDict(frozen=True)

    position: RunPosition
    config_hash: str
    config: dict[str, Any]
    tokenizer_hash: str
    data_fingerprint: str
    strategy: str
    world_size: int
    global_batch: int
    metrics: dict[str, float] = {}
    files: dict[str, FileRecord] = {}
    digest: str = ""

    def sealed(self) -> "CheckpointManifest":
        """The same manifest with `digest`, the SHA-256 of all the rest."""
        text = self.model_dump_json(exclude={"digest"})
        return self.model_copy(update={"digest": hashlib.sha256(text.encode()).hexdigest()})


def save_checkpoint(
    destination: Path,
    tensors: dict[str, Any],
    rank_state: dict[str, Any],
    manifest: CheckpointManifest,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Writes a checkpoint, on every rank together; it is on disk, whole, when this returns.

    A process that is killed in the middle leaves a folder whose name begins with a dot; `remove_leftovers` deletes it.

    Args:
        destination: The folder's final name, on a disk that all ranks share. One that stands there is replaced.
        tensors: Nested tensors and DTensors by name, alike in their names on every rank.
        rank_state: What only this rank has, as JSON can hold it.
        manifest: Everything but `files`.
        group: Gloo group of all ranks that nobody else uses meanwhile; None takes the default one.

    Raises:
        CheckpointError: The disk is full, or refuses to be written.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    temporary = destination.with_name(f".{destination.name}.tmp")
    destination.parent.mkdir(parents=True, exist_ok=True)
    _require_space(destination, tensors, group)
    try:
        _together(destination, group, lambda: _make_empty(temporary) if rank == 0 else None)
        _write_tensors(destination, temporary, tensors, group)
        parts = _together(destination, group, lambda: _finish_own_files(temporary, rank, rank_state))
        complete = manifest.model_copy(
            update={"files": {name: record for part in parts for name, record in part.items()}}
        )
        _together(destination, group, lambda: _publish(temporary, destination, complete) if rank == 0 else None)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_tensors(folder: Path, tensors: dict[str, Any]) -> None:
    """Fills `tensors` in place from a verified checkpoint, on every rank together.

    Args:
        folder: The checkpoint.
        tensors: The same names as were saved; shards and the number of ranks may differ.

    Raises:
        CheckpointError: A tensor is missing there or has another shape.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())
        except CheckpointException as error:
            raise CheckpointError(f"{folder} does not fit this model: {_failures(error)}") from None
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{folder} does not fit this model: {error}") from None


def read_rank_state(folder: Path, rank: int) -> dict[str, Any] | None:
    """What one rank saved for itself; None where the checkpoint is of fewer ranks."""
    path = folder / f"rank_{rank:05d}.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def verify_checkpoint(folder: Path) -> CheckpointManifest:
    """Reads a checkpoint's manifest and holds every file against it.

    Raises:
        CheckpointError: There is no manifest, or a file is missing, cut or changed; the message names it.
    """
    path = folder / MANIFEST
    try:
        manifest = CheckpointManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is not a checkpoint, or was cut short.") from None
    except ValidationError:
        raise CheckpointError(f"{path} cannot be read: it was cut or changed.") from None
    if manifest != manifest.sealed():
        raise CheckpointError(f"{path} was changed after it was saved: it does not hold its own SHA-256.")
    for name, record in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing.")
        size = file.stat().st_size
        if size != record.size:
            raise CheckpointError(f"{file} has {size} bytes, and was saved with {record.size}.")
        if _sha256(file) != record.sha256:
            raise CheckpointError(f"{file} was changed after it was saved: its SHA-256 is not the manifest's.")
    return manifest


def newest_valid_checkpoint(checkpoints: Iterable[tuple[int, Path]]) -> tuple[Path, CheckpointManifest] | None:
    """The last checkpoint that is whole; damaged ones after it are named in the log.

    Args:
        checkpoints: Steps and folders.
    """
    for _, folder in sorted(checkpoints, reverse=True):
        try:
            return folder, verify_checkpoint(folder)
        except CheckpointError as error:
            logger.warning("damaged checkpoint passed over: %s", error)
    return None


def drop_checkpoints(checkpoints: Iterable[tuple[int, Path]]) -> None:
    """Deletes checkpoints; rank 0 alone calls it."""
    for _, folder in checkpoints:
        _delete(folder)


def remove_leftovers(run_folder: Path) -> None:
    """Deletes what killed processes left of saving and deleting checkpoints; rank 0 alone calls it."""
    for pattern in (".checkpoint_*.pt.tmp", ".checkpoint_*.pt.old"):
        for folder in run_folder.glob(pattern):
            shutil.rmtree(folder)


def _finish_own_files(temporary: Path, rank: int, rank_state: dict[str, Any]) -> dict[str, FileRecord]:
    own = temporary / f"rank_{rank:05d}.json"
    own.write_text(json.dumps(rank_state), encoding="utf-8")
    records = {}
    for path in (own, *temporary.glob(f"shard-{rank + 1:05d}-*")):
        _sync(path)
        records[path.name] = FileRecord(size=path.stat().st_size, sha256=_sha256(path))
    return records


def _publish(temporary: Path, destination: Path, manifest: CheckpointManifest) -> None:
    """Writes the manifest and gives the folder its final name, each on disk before the next."""
    (temporary / MANIFEST).write_text(manifest.sealed().model_dump_json(indent=2) + "\n", encoding="utf-8")
    _sync(temporary / MANIFEST)
    _sync(temporary)
    if destination.exists():
        _delete(destination)
    temporary.rename(destination)
    _sync(destination.parent)


def _write_tensors(
    destination: Path, temporary: Path, tensors: dict[str, Any], group: dist.ProcessGroup | None
) -> None:
    writer = HuggingFaceStorageWriter(
        str(temporary), fqn_to_index_mapping=_file_of_each(tensors), save_distributed=True
    )
    # Not undone: this may be a thread of its own, and the list of filters is the whole process's.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        if all(isinstance(cause, OSError) for cause, _ in error.failures.values()):
            raise _cannot_write(destination, _failures(error)) from None
        raise


def _file_of_each(tensors: dict[str, Any]) -> dict[str, int]:
    """Number of the file, from 1, that each tensor goes into, so that no file passes `FILE_BYTES` by much."""
    numbers: dict[str, int] = {}
    number, size = 1, 0
    for name, tensor in _flat(tensors):
        if size and size + _local_bytes(tensor) > FILE_BYTES:
            number, size = number + 1, 0
        numbers[name] = number
        size += _local_bytes(tensor)
    return numbers


def _flat(tensors: dict[str, Any], prefix: str = "") -> list[tuple[str, Tensor]]:
    """Tensors by the dotted names that DCP gives them."""
    found: list[tuple[str, Tensor]] = []
    for key, value in tensors.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found += _flat(value, f"{name}.")
        else:
            assert isinstance(value, Tensor), f"{name} is a {type(value).__name__}: checkpoints hold tensors only"
            found.append((name, value))
    return found


def _local_bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def _require_space(destination: Path, tensors: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    flat = _flat(tensors)
    sharded = sum(_local_bytes(tensor) for _, tensor in flat if isinstance(tensor, DTensor))
    whole = sum(_local_bytes(tensor) for _, tensor in flat if not isinstance(tensor, DTensor))
    needed = sum(_gather(sharded, group)) + whole + SPARE_BYTES
    free = min(_gather(shutil.disk_usage(destination.parent).free, group))
    if free < needed:
        raise CheckpointError(
            f"{destination} needs {needed / 1e6:,.0f} MB and its disk has {free / 1e6:,.0f} MB free; make room, lower "
            "training.keep_checkpoints, or set output.output_dir to another disk. The checkpoints before it are whole."
        )


def _together(destination: Path, group: dist.ProcessGroup | None, work: Callable[[], Any]) -> list[Any]:
    """Does this rank's work, waits for all, and fails on every rank where the disk fails one of them.

    Returns:
        What each rank's work returned.
    """
    result, failure = None, ""
    try:
        result = work()
    except OSError as error:
        failure = str(error)
    outcomes = _gather((result, failure), group)
    failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text]
    if failures:
        raise _cannot_write(destination, "; ".join(failures))
    return [result for result, _ in outcomes]


def _cannot_write(destination: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{destination} cannot be written: {reason}. The checkpoints before it are whole; make room or mend the disk, "
        "and start the same command again to go on from them."
    )


def _failures(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in sorted(error.failures.items()))


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """The value of each rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()


def _delete(folder: Path) -> None:
    """Deletes a checkpoint; it loses its name first, so that a cut deletion leaves nothing that looks like one."""
    doomed = folder.with_name(f".{folder.name}.old")
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    """Has the disk hold a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
