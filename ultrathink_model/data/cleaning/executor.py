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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger as datatrove_logger

from ultrathink_model.config.data import DataConfig
from ultrathink_model.errors import DataError, DependencyError

logger = logging.getLogger(__name__)

POLL_SECONDS = 5.0
# A job that has left Slurm's queue may have left files that a shared disk does not show yet.
GONE_POLLS = 6

Steps = Sequence[PipelineStep]


def run_tasks(
    data: DataConfig, steps: Steps, tasks: int, records: Path, *, light: bool = False
) -> dict[str, Counter[str]]:
    """Runs a pipeline's tasks, those that an earlier start finished excepted, and adds up what the steps counted.

    Args:
        data: `data.executor` and its fellows.
        steps: The pipeline; every task runs all of it.
        tasks: Number of tasks, which decides what each is given; what comes out does not depend on the executor.
        records: Folder of the logs, the counts, and the marks of finished tasks.
        light: Whether tasks may share jobs of other machines.

    Returns:
        The counts of each step by its name.

    Raises:
        DataError: Tasks failed on other machines; the message names their logs.
        DependencyError: Ray or Slurm is not there.
    """
    workers = min(tasks, data.executor_workers or os.cpu_count() or 1)
    with _quiet():
        executor = _EXECUTORS[data.executor](data, steps, tasks, workers, records)
        if light and isinstance(executor, RayPipelineExecutor | SlurmPipelineExecutor):
            executor.tasks_per_job = -(-tasks // workers)
        if data.executor == "ray":
            with _ray(workers):
                executor.run()
        else:
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


def _local(data: DataConfig, steps: Steps, tasks: int, workers: int, records: Path) -> PipelineExecutor:
    return _LocalExecutor(list(steps), tasks=tasks, workers=workers, logging_dir=str(records))


def _on_ray(data: DataConfig, steps: Steps, tasks: int, workers: int, records: Path) -> PipelineExecutor:
    # No memory is reserved: a machine with less than datatrove's 2 GB for each processor would wait for ever.
    return RayPipelineExecutor(list(steps), tasks=tasks, workers=workers, logging_dir=str(records), mem_per_cpu_gb=0)


def _on_slurm(data: DataConfig, steps: Steps, tasks: int, workers: int, records: Path) -> PipelineExecutor:
    if shutil.which("sbatch") is None:
        raise DependencyError(
            "data.executor=slurm needs `sbatch`, which is not here; start on a login node, or use local."
        )
    return SlurmPipelineExecutor(
        list(steps),
        tasks=tasks,
        workers=workers,
        logging_dir=str(records),
        partition=data.slurm_partition,
        time=data.slurm_time,
        job_name="ultrathink-cleaning",
        venv_path=str(Path(sys.prefix) / "bin" / "activate"),
        mail_type="NONE",
        requeue=False,
    )


_EXECUTORS = {"local": _local, "ray": _on_ray, "slurm": _on_slurm}


@contextmanager
def _ray(workers: int) -> Iterator[None]:
    """A Ray cluster: the one of RAY_ADDRESS, or one on this machine that ends with the work."""
    try:
        import ray  # noqa: PLC0415 - optional
    except ImportError:
        raise DependencyError(
            "data.executor=ray needs the package ray: pip install 'ultrathink-model[ray]', or set data.executor=local."
        ) from None
    own = not ray.is_initialized()
    if own:
        local: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "include_dashboard": False}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
    try:
        yield
    finally:
        if own:
            ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps datatrove's messages off the terminal, of this process and of its children; errors are raised all the same."""
    before = os.environ.get("LOGURU_LEVEL")
    os.environ["LOGURU_LEVEL"] = "ERROR"
    datatrove_logger.disable("datatrove")
    try:
        yield
    finally:
        datatrove_logger.enable("datatrove")
        if before is None:
            del os.environ["LOGURU_LEVEL"]
        else:
            os.environ["LOGURU_LEVEL"] = before


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
