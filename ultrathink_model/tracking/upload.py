"""Delivery of a run's spool to MLflow: in order, none lost, none twice, over any number of restarts."""

import logging
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ValidationError

from ultrathink_model.config import Config
from ultrathink_model.tracking.metrics import read_spool
from ultrathink_model.tracking.mlflow_store import (
    METRICS_PER_BATCH,
    MlflowStore,
    Point,
    config_params,
    redacted_config,
)
from ultrathink_model.tracking.run_folder import RunFolder, write_atomically

RUN_KEY_TAG = "ultrathink.run_key"

logger = logging.getLogger(__name__)


class Artifact(BaseModel):
    """A file or folder to upload, and the folder among the artifacts that it goes to."""

    path: str
    folder: str


class UploadState(BaseModel):
    """What MLflow has of a run: the content of `mlflow.json`."""

    run_key: str
    run_id: str | None = None
    sent: dict[str, int] = {}  # last step of each metric that MLflow has
    in_flight: dict[str, int] = {}  # the same for the batch whose answer is not in yet
    artifacts: list[Artifact] = []  # not uploaded yet

    @classmethod
    def load(cls, path: Path) -> "UploadState":
        """Reads the file; where there is none, or none that can be read, nothing has been sent yet."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return cls(run_key=uuid.uuid4().hex)


class Spool:
    """One metrics file, and how far it has been read.

    A resumed run replaces the file, with its last lines dropped and later written anew. It is then read from its
    start; the steps that MLflow has already are passed over by the marks in `UploadState.sent`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self._inode: int | None = None

    def unsent(self, sent: Mapping[str, int]) -> tuple[list[Point], int]:
        """Points past the marks, from `offset` until a full batch is together, and the offset of their end."""
        self._notice_replacement()
        marks = dict(sent)
        points: list[Point] = []
        end = self.offset
        for row, row_end in read_spool(self.path, self.offset):
            end = row_end
            step = int(row.pop("step"))
            time = row.pop("time", 0.0)
            new = {name: value for name, value in row.items() if step > marks.get(name, -1)}
            marks.update(dict.fromkeys(new, step))
            points += [Point(name, value, time, step) for name, value in new.items()]
            if len(points) >= METRICS_PER_BATCH:
                break
        return points, end

    def _notice_replacement(self) -> None:
        if not self.path.exists():
            return
        status = self.path.stat()
        if status.st_ino != self._inode or status.st_size < self.offset:
            self._inode = status.st_ino
            self.offset = 0


class Uploader:
    """Brings MLflow up to date with a run's folder, a round at a time.

    `deliver` raises what MLflow raises and may be called again at any time, also by another process after this one
    was killed. Before a batch goes out its marks are noted on disk as in flight; when no answer is on record, the
    store itself is asked how far it came.
    """

    def __init__(
        self,
        store: MlflowStore,
        config: Config,
        folder: RunFolder,
        state: UploadState,
        *,
        run_name: str,
        tags: Mapping[str, str],
    ) -> None:
        self.store = store
        self.end_status: str | None = None
        self.is_done = False
        self._config = config
        self._folder = folder
        self._state = state
        self._run_name = run_name
        self._tags = {**tags, RUN_KEY_TAG: state.run_key}
        self._spools = [Spool(folder.metrics_file), Spool(folder.system_metrics_file)]
        self._connected = False
        self._lock = threading.Lock()
        with self._changed_state():
            pass

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id, once it is known."""
        return self._state.run_id

    def queue(self, artifact: Artifact) -> None:
        """Adds an artifact to those to upload; the queue is on disk on return."""
        with self._changed_state() as state:
            state.artifacts.append(artifact)

    def deliver(self, last: bool) -> None:
        """Sends everything that is there to send; with `last`, also how the run ended."""
        run_id = self._connect()
        self._connected = False  # after a round that fails the run is looked for again: it may be gone
        self._settle(run_id)
        for spool in self._spools:
            self._send_points(run_id, spool)
        self._send_artifacts(run_id)
        self._connected = True
        if last:
            if self.end_status:
                self.store.end_run(run_id, self.end_status)
            self.is_done = True

    def describe_unsent(self) -> str:
        """What MLflow does not have yet, in words."""
        marks = self._state.sent
        rows = [row for spool in self._spools for row, _ in read_spool(spool.path, 0)]
        lines = sum(any(row["step"] > marks.get(name, -1) for name in row.keys() - {"step", "time"}) for row in rows)
        return f"{lines} lines of metrics and {len(self._state.artifacts)} artifacts"

    def _connect(self) -> str:
        """Finds or makes the run, and describes it."""
        run_id = self._state.run_id
        if self._connected and run_id:
            return run_id
        if run_id and not self.store.has_run(run_id):
            logger.warning("MLflow has run %s no more; the whole run is sent to a new one.", run_id)
            run_id = None
            with self._changed_state() as state:
                state.run_id, state.sent, state.in_flight = None, {}, {}
            for spool in self._spools:
                spool.offset = 0
        # A process killed between the making of the run and the note of its id has left a run with our key.
        run_id = run_id or self.store.find_run(RUN_KEY_TAG, self._state.run_key)
        run_id = run_id or self.store.create_run(self._run_name, self._tags)
        with self._changed_state() as state:
            state.run_id = run_id
        self._folder.set_mlflow_run_id(run_id)
        self.store.resume_run(run_id)
        self.store.send_params(run_id, config_params(self._config))
        self.store.send_text(run_id, redacted_config(self._config), "config.yaml")
        return run_id

    def _settle(self, run_id: str) -> None:
        """Finds out how much of a batch without an answer arrived."""
        if not self._state.in_flight:
            return
        arrived = {name: self.store.last_step(run_id, name) for name in self._state.in_flight}
        with self._changed_state() as state:
            state.sent.update({name: max(state.sent.get(name, -1), step) for name, step in arrived.items()})
            state.in_flight = {}

    def _send_points(self, run_id: str, spool: Spool) -> None:
        while True:
            points, end = spool.unsent(self._state.sent)
            for start in range(0, len(points), METRICS_PER_BATCH):
                batch = points[start : start + METRICS_PER_BATCH]
                with self._changed_state() as state:
                    state.in_flight = {point.name: point.step for point in batch}
                self.store.send_points(run_id, batch)
                with self._changed_state() as state:
                    state.sent.update(state.in_flight)
                    state.in_flight = {}
            spool.offset = end
            if not points:
                return

    def _send_artifacts(self, run_id: str) -> None:
        while self._state.artifacts:
            artifact = self._state.artifacts[0]
            path = Path(artifact.path)
            if path.exists():
                self.store.send_artifact(run_id, path, artifact.folder)
            else:
                logger.warning("MLflow: %s is gone, and is not uploaded.", path)
            with self._changed_state() as state:
                state.artifacts.remove(artifact)

    @contextmanager
    def _changed_state(self) -> Iterator[UploadState]:
        """The state, to change in the body; it is on disk after it."""
        with self._lock:
            yield self._state
            write_atomically(self._folder.mlflow_file, self._state.model_dump_json())
