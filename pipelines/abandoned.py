"""Runs that a kill left "running": whether anything still runs them, and closing them."""

import os
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.models import PipelineRunResponse
from zenml.orchestrators.publish_utils import publish_failed_step_run, publish_pipeline_run_status_update
from zenml.utils.pagination_utils import depaginate

LOCK_NAME = ".lock"
PIPELINE_NAMES = ("prototype_pipeline", "production_pipeline", "multi_gpu_pipeline")


def running_runs(pipeline: str) -> list[PipelineRunResponse]:
    """The runs of a pipeline that ZenML takes for running."""
    return depaginate(Client().list_pipeline_runs, pipeline_name=pipeline, status=ExecutionStatus.RUNNING, hydrate=True)


def plan_of(run: PipelineRunResponse) -> dict[str, Any]:
    """The plan that a run's first step was given; empty for a run that is none of ours."""
    steps = run.snapshot.step_configurations.values() if run.snapshot else ()
    plans = [step.config.parameters.get("plan", {}) for step in steps]
    return plans[0] if plans else {}


def is_abandoned(run: PipelineRunResponse) -> bool:
    """Whether no process of this machine runs it; a run on machines of a cloud is never said to be."""
    plan = plan_of(run)
    if run.status != ExecutionStatus.RUNNING or not plan or plan.get("remote") or is_deployed(run):
        return False
    folder = Path(plan["folder"])
    if not folder.is_dir():
        return True
    lock = FileLock(str(folder / LOCK_NAME))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    return True


def is_deployed(run: PipelineRunResponse) -> bool:
    """Whether a deployment on this machine, whose process is alive, started the run: such a run holds no lock."""
    if run.trigger_info is None or run.trigger_info.deployment_id is None:
        return False
    try:
        deployment = Client().get_deployment(run.trigger_info.deployment_id)
    except KeyError:
        return False
    process = (deployment.deployment_metadata or {}).get("pid")
    return process is not None and psutil.pid_exists(process)


def close(run: PipelineRunResponse) -> None:
    """Shows a run that is abandoned, and its unfinished steps, as failed."""
    for step in run.steps.values():
        if not step.status.is_finished:
            publish_failed_step_run(step.id)
    publish_pipeline_run_status_update(
        run.id, ExecutionStatus.FAILED, status_reason=f"its process ended; closed by process {os.getpid()}"
    )
