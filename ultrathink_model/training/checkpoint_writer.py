"""Checkpoints written beside training: a copy is taken, training goes on, and a thread writes the copy."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from ultrathink_model.training.checkpoint import CheckpointManifest, save_checkpoint

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes one checkpoint at a time. Every rank makes the same calls in the same order.

    The thread exchanges over a gloo group of its own: on the default group its exchanges would meet those of the
    steps that go on meanwhile. What failed in the thread is raised by the next `wait`, on all ranks alike.
    """

    def __init__(self, *, in_background: bool) -> None:
        """Prepares the writer.

        Args:
            in_background: Whether `save` returns as soon as a copy is taken.
        """
        self._stager: DefaultStager | None = None
        self._group: dist.ProcessGroup | None = None
        if in_background:
            if dist.is_initialized():
                self._group = dist.new_group(backend="gloo")
            pinned = torch.cuda.is_available()
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=pinned,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=pinned,
                )
            )
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(
        self,
        destination: Path,
        tensors: dict[str, Any],
        rank_state: dict[str, Any],
        manifest: CheckpointManifest,
        afterwards: Callable[[], None],
    ) -> None:
        """Writes a checkpoint, or begins to.

        Args:
            destination: The folder's final name.
            tensors: As `save_checkpoint` takes them.
            rank_state: What only this rank has.
            manifest: Everything but `files`.
            afterwards: What is to be done when the checkpoint stands under its name.

        Raises:
            CheckpointError: This checkpoint, or the one before in the background, could not be written.
        """
        self.wait()
        began = time.perf_counter()
        if self._stager is None:
            save_checkpoint(destination, tensors, rank_state, manifest)
            afterwards()
            logger.info("saved %s in %.2f s", destination.name, time.perf_counter() - began)
            return
        copied = self._stager.stage(tensors)
        waited = time.perf_counter() - began

        def write() -> None:
            try:
                save_checkpoint(destination, copied, rank_state, manifest, self._group)  # type: ignore[arg-type]
                afterwards()
            except Exception as error:  # noqa: BLE001 - `wait` raises it where it can be handled
                self._failure = error
            else:
                seconds = time.perf_counter() - began
                logger.info("saved %s in %.2f s, for which training waited %.2f s", destination.name, seconds, waited)

        # A daemon: a process that ends on an error does not wait for it, and what it has not named is no checkpoint.
        self._thread = threading.Thread(target=write, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            CheckpointError: What was being written could not be.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Lets a write come to its end where it waits for no other rank, one that may have died."""
        if self._thread is not None and self._group is None:
            self._thread.join()
