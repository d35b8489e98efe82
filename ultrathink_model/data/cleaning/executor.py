"""Where cleaning runs: datatrove's executors, chosen by `data.executor`."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor import ray as ray_executor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger as datatrove_logger
from datatrove.utils.stats import PipelineStats

from ultrathink_model.config.data import DataConfig
from ultrathink_model.errors import DataError, DependencyError

logger = logging.getLogger(__name__)

POLL_SECONDS = 5.0
# A job that has left Slurm's queue may have left files that a shared disk does not show yet.
GONE_POLLS = 6
RAY_SETTINGS = {
    # No report of use goes to Ray's makers.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Under `uv run` Ray would pack the working folder and build every worker's environment anew.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Ray's coming default, which it warns of otherwise.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

Steps = Sequence[PipelineStep]


@contextmanager
def open_executor(data: DataConfig) -> Iterator[None]:
    """What has to be there while pipelines run: for Ray a cluster, made once for all of them since that takes seconds.

    Raises:
        DependencyError: Ray or Slurm is not there.
    """
    if data.executor == "slurm" and shutil.which("sbatch") is None:
        raise DependencyError(
            "data.executor=slurm needs `sbatch`, which is not here; start on a login node, or use local."
        )
    with _quiet(), _ray(_all_workers(data)) if data.executor == "ray" else nullcontext():
        yield


def _all_workers(data: DataConfig) -> int:
    return data.executor_workers or os.cpu_count() or 1


def run_tasks(
    data: DataConfig, steps: Steps, tasks: int, records: Path, *, light: bool = False
) -> dict[str, Counter[str]]:
    """Runs a pipeline's tasks, those that an earlier start finished excepted, and adds up what the steps counted.

    Args:
        data: `data.executor` and its fellows; the caller has `open_executor` around all its pipelines.
        steps: The pipeline; every task runs all of it.
        tasks: Number of tasks, which decides what each is given; what comes out does not depend on the executor.
        records: Folder of the logs, the counts, and the marks of finished tasks.
        light: Whether tasks may share jobs of other machines.

    Returns:
        The counts of each step by its name.

    Raises:
        DataError: Tasks failed on other machines; the message names their logs.
    """
    workers = min(tasks, _all_workers(data))
    executor = _EXECUTORS[data.executor](data, steps, tasks, workers, records)
    if light and isinstance(executor, ray_executor.RayPipelineExecutor | SlurmPipelineExecutor):
        executor.tasks_per_job = -(-tasks // workers)
    executor.run()
    if isinstance(executor, SlurmPipelineExecutor):
        _wait_for_jobs(executor)
    failed = executor.get_incomplete_ranks(skip_completed=True)
    if failed:
        raise DataError(
            f"{len(failed)} of {tasks} cleaning tasks failed under data.executor={data.executor}; see "
            f"{records / 'logs' / f'task_{failed[0]:05d}.log'} there, mend the cause, and start again."
        )
    return _add_up(records, tasks)


class _LocalExecutor(LocalPipelineExecutor):
    """datatrove's, with its messages in the log files only: of the first task it shows everything on the terminal."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> object:
        return super()._run_for_rank(rank, local_rank + 1, node_rank)


class _SlurmExecutor(SlurmPipelineExecutor):
    """datatrove's, without the job that adds up the counts, which is done here."""

    def launch_merge_stats(self) -> None:
        pass


def _local(data: DataConfig, steps: Steps, tasks: int, workers: int, records: Path) -> PipelineExecutor:
    return _LocalExecutor(list(steps), tasks=tasks, workers=workers, logging_dir=str(records))


def _on_ray(data: DataConfig, steps: Steps, tasks: int, workers: int, records: Path) -> PipelineExecutor:
    # No memory is reserved: a machine with less than datatrove's 2 GB for each processor would wait for ever.
    return ray_executor.RayPipelineExecutor(
        list(steps), tasks=tasks, workers=workers, logging_dir=str(records), mem_per_cpu_gb=0
    )


def _on_slurm(data: DataConfig, steps: Steps, tasks: int, workers: int, records: Path) -> PipelineExecutor:
    return _SlurmExecutor(
        list(steps),
        tasks=tasks,
        workers=workers,
        logging_dir=str(records),
        partition=data.slurm_partition,
        time=data.slurm_time,
        job_name="ultrathink-cleaning",
        venv_path=str(Path(sys.prefix) / "bin" / "activate"),
        # The cluster's own default; not every cluster has a class of service named `normal`.
        qos="",
        requeue=False,
    )


class _RayTaskManager(ray_executor.RayTaskManager):
    """datatrove's, which starts jobs in threads and would wait for ever for one that could not be started."""

    def submit_task(self, *arguments: Any) -> Future[Any]:
        started = super().submit_task(*arguments)
        self.pg_futures[-1].add_done_callback(partial(_pass_on_error, started))
        return started


class _RankWorker(ray_executor.RankWorker):
    """datatrove's, which does its ranks in turn: forked beside Ray's threads, as datatrove does, some never ended."""

    def run_for_rank(
        self, executor_ref: ray_executor.RayPipelineExecutor, ranks: list[int], node_ips: list[str], node_idx: int
    ) -> PipelineStats:
        os.environ |= {"RAY_NODELIST": ",".join(node_ips), "RAY_NODEID": str(node_idx)}
        failures = []
        for rank in ranks:
            try:
                # Local rank 0 would print its log on the terminal.
                executor_ref._run_for_rank(rank, 1)
            except Exception as error:  # noqa: BLE001 - raised below, once the others are done
                failures.append(error)
        if failures:
            raise failures[0]
        return PipelineStats()


def _pass_on_error(started: Future[Any], thread: Future[Any]) -> None:
    if not thread.cancelled() and (error := thread.exception()) is not None:
        logger.error("data.executor=ray: a job could not be started: %s: %s", type(error).__name__, error)
        started.set_exception(error)


ray_executor.RayTaskManager = _RayTaskManager
ray_executor.RankWorker = _RankWorker

_EXECUTORS = {"local": _local, "ray": _on_ray, "slurm": _on_slurm}


@contextmanager
def _ray(workers: int) -> Iterator[None]:
    """A Ray cluster: the one of RAY_ADDRESS, or one on this machine that ends with the work."""
    with _environment(RAY_SETTINGS):
        try:
            import ray  # noqa: PLC0415 - optional
        except ImportError:
            raise DependencyError(
                "data.executor=ray needs the package ray: pip install 'ultrathink-model[ray]', or set data.executor=local."
            ) from None
        own = not ray.is_initialized()
        if own:
            local: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False}
            settings = {} if "RAY_ADDRESS" in os.environ else local
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
            except Exception as error:  # noqa: BLE001 - Ray raises plain `Exception` where a node is slow to start
                raise DependencyError(
                    f"data.executor=ray: no cluster was to be had ({error}); look into /tmp/ray/session_latest/logs, start "
                    "one by `ray start --head` and name it in RAY_ADDRESS, or set data.executor=local."
                ) from None
        try:
            yield
        finally:
            if own:
                ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps datatrove's messages off the terminal, of this process and of its children; errors are raised all the same."""
    datatrove_logger.disable("datatrove")
    try:
        with _environment({"LOGURU_LEVEL": "ERROR"}):
            yield
    finally:
        datatrove_logger.enable("datatrove")


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets variables that the user has not set, for this process and the children made within."""
    missing = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _wait_for_jobs(executor: SlurmPipelineExecutor) -> None:
    """Waits until every task is done or its job has left Slurm's queue."""
    gone = 0
    while executor.get_incomplete_ranks(skip_completed=True) and gone < GONE_POLLS:
        queued = subprocess.run(
            ["squeue", "--noheader", "--jobs", str(executor.job_id)], capture_output=True, text=True, check=False
        )
        gone = 0 if queued.stdout.strip() else gone + 1
        time.sleep(POLL_SECONDS)


def _add_up(records: Path, tasks: int) -> dict[str, Counter[str]]:
    """The counts of all tasks; datatrove's own sum leaves out the tasks of an earlier start."""
    totals: dict[str, Counter[str]] = {}
    for task in range(tasks):
        for step in json.loads((records / "stats" / f"{task:05d}.json").read_bytes()):
            name = step["name"].rpartition(": ")[2]
            counts = totals.setdefault(name, Counter())
            for label, value in step["stats"].items():
                counts[label] += int(value["total"] if isinstance(value, dict) else value)
    return totals
