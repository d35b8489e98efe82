"""What happens before a workflow is wired: its plan, its folder's lock, and the clearing up after earlier runs."""

import logging
from collections.abc import Sequence

from filelock import FileLock, Timeout
from zenml.client import Client

from pipelines.abandoned import LOCK_NAME, close, is_deployed, plan_of, running_runs
from steps.caching import expire_stale_results
from ultrathink_model.errors import ConfigError
from ultrathink_model.workflow import WorkflowPlan, plan_workflow

logger = logging.getLogger(__name__)

# Held until the process ends, however it ends; a second start in the same process is let through.
_locks: dict[str, FileLock] = {}


def begin(workflow: str, profile: str | None, config: str | None, overrides: Sequence[str] | None) -> WorkflowPlan:
    """The plan that a pipeline is wired from, with the way cleared for it.

    Earlier results that no longer hold are taken out of ZenML's cache, and runs that a kill left "running" are shown
    as failed.

    Raises:
        ConfigError: The plan cannot be made, or another process runs the workflow in this folder.
    """
    root = remote_root()
    plan = plan_workflow(workflow, profile, config, overrides or (), root)
    if root is not None:
        print(f"{plan.workflow}: {plan.reason}; results go to {plan.remote}", flush=True)
        return without_local_mlflow(plan)
    _take_lock(plan)
    print(f"{plan.workflow}: {plan.reason}; results go to {plan.folder}", flush=True)
    _close_abandoned_runs(plan)
    expire_stale_results(str(plan.folder), plan.steps)
    return plan


def remote_root() -> str | None:
    """Where the active stack keeps runs' folders; None where its steps run on this machine."""
    stack = Client().active_stack
    return f"{stack.artifact_store.path.rstrip('/')}/runs" if stack.orchestrator.config.is_remote else None


def without_local_mlflow(plan: WorkflowPlan) -> WorkflowPlan:
    """The plan, without MLflow where its store is a file of this machine, which the steps' machines cannot reach."""
    uri = plan.config.logging.mlflow_tracking_uri
    if not plan.config.logging.use_mlflow or uri.startswith(("http://", "https://", "databricks")):
        return plan
    print(
        f"logging.mlflow_tracking_uri={uri} is a store on this machine, which the stack's machines do not reach: "
        "metrics are kept in the runs' folders alone. Name a server (http://…) to have them in MLflow.",
        flush=True,
    )
    off = {"use_mlflow": False}
    steps = {}
    for name, step in plan.steps.items():
        config = step.config.model_copy(update={"logging": step.config.logging.model_copy(update=off)})
        steps[name] = step.model_copy(update={"config": config})
    return plan.model_copy(update={"steps": steps})


def _take_lock(plan: WorkflowPlan) -> None:
    path = str(plan.folder / LOCK_NAME)
    if path in _locks:
        return
    plan.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another process runs {plan.workflow} in {plan.folder}; wait for it, or write elsewhere with "
            "--override output.output_dir=FOLDER."
        ) from None
    _locks[path] = lock


def _close_abandoned_runs(plan: WorkflowPlan) -> None:
    """Shows runs of this folder that are "running" as failed: we hold its lock, so none is but a deployment's.

    Raises:
        ConfigError: A deployment runs the workflow in this folder.
    """
    for run in running_runs(f"{plan.workflow}_pipeline"):
        if plan_of(run).get("folder") == str(plan.folder):
            if is_deployed(run):
                raise ConfigError(
                    f"{run.name}, of a deployment, runs {plan.workflow} in {plan.folder}; wait for it, or write "
                    "elsewhere with --override output.output_dir=FOLDER."
                )
            logger.warning("run %s was cut off and is shown as failed from now on.", run.name)
            close(run)
