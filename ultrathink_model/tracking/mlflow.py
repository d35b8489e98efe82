"""MLflow: a thread that feeds a run's metrics to it from disk, and never holds training up."""

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ultrathink_model.config import Config
from ultrathink_model.tracking.mlflow_store import MlflowStore, attempt, check_tracking_uri
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.tracking.system import SystemSampler
from ultrathink_model.tracking.upload import Artifact, Uploader, UploadState

MlflowStatus = Literal["FINISHED", "FAILED", "KILLED"]

POLL_SECONDS = 2.0
FIRST_RETRY_SECONDS = 2.0
LONGEST_RETRY_SECONDS = 60.0
LAST_TRIES = 3

logger = logging.getLogger(__name__)


class MlflowRun:
    """The MLflow run of one stage, fed by a daemon thread from the run's folder.

    `metrics.jsonl` is the spool: what was logged is on disk before MLflow hears of it. `mlflow.json` beside it
    holds the last step that MLflow has of each metric, so that every point is sent once, in order, over any number
    of restarts. A store that is down, slow or full only makes the thread wait; what it could not send goes out
    when the run is started again. Rank 0 makes one of these where `logging.use_mlflow` is set.
    """

    def __init__(self, uploader: Uploader, sampler: SystemSampler | None) -> None:
        """Use `MlflowRun.start`."""
        self._uploader = uploader
        self._sampler = sampler
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow-upload", daemon=True)
        self._thread.start()

    @classmethod
    def start(
        cls,
        config: Config,
        run_name: str,
        folder: RunFolder,
        *,
        parent_run_id: str | None = None,
        resume_run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> "MlflowRun":
        """Starts tracking, and returns before MLflow is even imported.

        Call it after `RunFolder.begin` and after `MetricsWriter.truncate_after`.

        Args:
            config: Its `logging` section names the store and the experiment; all of it becomes the run's params.
            run_name: Name of a new MLflow run.
            folder: Where the metrics lie. A run that the folder already has goes on.
            parent_run_id: MLflow run that a new run is shown under.
            resume_run_id: MLflow run to go on with, where the folder has none of its own.
            tags: Tags of a new run.

        Raises:
            ConfigError: `logging.mlflow_tracking_uri` names a store that this MLflow refuses.
        """
        check_tracking_uri(config.logging.mlflow_tracking_uri)
        state = UploadState.load(folder.mlflow_file)
        state.run_id = state.run_id or resume_run_id
        run_tags = {**(tags or {}), **({"mlflow.parentRunId": parent_run_id} if parent_run_id else {})}
        uploader = Uploader(MlflowStore(config.logging), config, folder, state, run_name=run_name, tags=run_tags)
        sampler = SystemSampler(folder.system_metrics_file) if config.logging.system_metrics else None
        return cls(uploader, sampler)

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None until MLflow has answered."""
        return self._uploader.run_id

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Queues a file or a folder for upload; the queue is on disk and outlives this process.

        Args:
            path: File or folder; it must stay where it is until it is sent.
            folder: Folder among the run's artifacts to put it in; its root by default.
        """
        self._uploader.queue(Artifact(path=str(path.resolve()), folder=folder))

    def finish(self, status: MlflowStatus = "FINISHED", wait_seconds: float = 30.0) -> None:
        """Sends what is left, for at most `wait_seconds`, and says in the log what could not be sent.

        Args:
            status: How the run is shown in MLflow; `KILLED` for one that was stopped and can go on.
            wait_seconds: Longest wait for MLflow.
        """
        if self._sampler:
            self._sampler.stop()
        self._uploader.end_status = status
        self._stop.set()
        self._thread.join(wait_seconds)
        if self._thread.is_alive() or not self._uploader.is_done:
            logger.warning(
                "MLflow at %s has not taken %s; they are kept in the run's folder and sent when the run is started again.",
                self._uploader.store.safe_uri,
                self._uploader.describe_unsent(),
            )

    def _run(self) -> None:
        wait = POLL_SECONDS
        while not self._stop.wait(wait):
            wait = self._next_wait(attempt(lambda: self._uploader.deliver(last=False)), wait)
        for _ in range(LAST_TRIES):
            error = attempt(lambda: self._uploader.deliver(last=True))
            if error is None:
                return
            logger.warning("MLflow at %s: %s", self._uploader.store.safe_uri, error)
            time.sleep(FIRST_RETRY_SECONDS)

    def _next_wait(self, error: Exception | None, wait: float) -> float:
        """Seconds to the next round: doubled after each failure, up to a minute."""
        if error is None:
            return POLL_SECONDS
        longer = min(max(2 * wait, FIRST_RETRY_SECONDS), LONGEST_RETRY_SECONDS)
        logger.warning("MLflow at %s: %s; trying again in %.0f s.", self._uploader.store.safe_uri, error, longer)
        return longer


def create_parent_run(config: Config, name: str, tags: Mapping[str, str] | None = None) -> str | None:
    """Makes the MLflow run that a pipeline's stages are shown under.

    Unlike a stage's run it is made at once, because the stages need its id; with MLflow down the pipeline goes on
    without one.

    Returns:
        The run's id, or None (and a warning in the log) where MLflow cannot be reached.
    """
    check_tracking_uri(config.logging.mlflow_tracking_uri)
    store = MlflowStore(config.logging)
    run_id: list[str] = []
    error = attempt(lambda: run_id.append(store.create_run(name, dict(tags or {}))))
    if error:
        logger.warning("MLflow at %s: %s; the stages have no common run there.", store.safe_uri, error)
    return run_id[0] if run_id else None


def end_parent_run(config: Config, run_id: str, status: MlflowStatus = "FINISHED") -> None:
    """Closes a pipeline's run; a store that cannot be reached is named in the log."""
    store = MlflowStore(config.logging)
    error = attempt(lambda: store.end_run(run_id, status))
    if error:
        logger.warning("MLflow at %s: %s; the pipeline's run stays open there.", store.safe_uri, error)
