"""The MLflow run of a whole workflow: every step finds it, and a start that takes up a cut workflow goes on with it."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ValidationError
from zenml import get_step_context
from zenml.exceptions import RunInterruptedException

from steps.references import EvaluationReference
from ultrathink_model.errors import TrainingStoppedError
from ultrathink_model.tracking.mlflow import create_parent_run, end_parent_run
from ultrathink_model.tracking.mlflow_store import MlflowStore, Point, attempt
from ultrathink_model.tracking.remote_folder import RemoteFolder, upload
from ultrathink_model.tracking.run_folder import write_atomically
from ultrathink_model.workflow import StepPlan

RECORD_NAME = "workflow.json"

logger = logging.getLogger(__name__)


class WorkflowRecord(BaseModel):
    """The content of `workflow.json`: the MLflow run of the workflow, and whether the workflow is through."""

    mlflow_run_id: str
    is_finished: bool = False


@contextmanager
def parent_run(plan: StepPlan, *, trains: bool = False) -> Iterator[str | None]:
    """The id of the workflow's MLflow run while a step works; the run is shown as ended if the step fails.

    A run that is not finished is gone on with, so that a workflow that was killed and started again has one run. A
    stage that trains after the workflow was through begins a new one; a step that only evaluates, exports or
    reports belongs to the run that it looks at.

    Yields:
        The id; None without MLflow, or while it cannot be reached.
    """
    config = plan.config
    run_id = _find_or_create(plan, trains) if config.logging.use_mlflow else None
    try:
        yield run_id
    except (TrainingStoppedError, RunInterruptedException, KeyboardInterrupt):
        if run_id:
            end_parent_run(config, run_id, "KILLED")
        raise
    except BaseException:
        if run_id:
            end_parent_run(config, run_id, "FAILED")
        raise


def finish_parent_run(plan: StepPlan, run_id: str, evaluation: EvaluationReference, artifacts: list[Path]) -> None:
    """Gives the workflow's run the last stage's evaluation and the artifacts, and ends it."""
    store = MlflowStore(plan.config.logging)

    def send() -> None:
        now = time.time()
        store.send_points(run_id, [Point(name, value, now, 0) for name, value in evaluation.metrics.items()])
        for path in artifacts:
            store.send_artifact(run_id, path, "")

    error = attempt(send)
    if error:
        logger.warning("MLflow at %s: %s; the workflow's results are on disk only.", store.safe_uri, error)
    end_parent_run(plan.config, run_id)
    _write(plan, WorkflowRecord(mlflow_run_id=run_id, is_finished=True))


def known_parent_run(plan: StepPlan) -> str | None:
    """The id of the workflow's MLflow run, through or not; None where it has none."""
    record = _read(plan)
    return record.mlflow_run_id if record else None


def _find_or_create(plan: StepPlan, trains: bool) -> str | None:
    record = _read(plan)
    store = MlflowStore(plan.config.logging)
    if record and not (trains and record.is_finished):
        known = record.mlflow_run_id
        found: list[bool] = []
        error = attempt(lambda: found.append(store.has_run(known)))
        if error or not found[0]:
            logger.warning("MLflow at %s: %s.", store.safe_uri, error or f"run {known} is gone; a new one is begun")
        elif attempt(lambda: store.resume_run(known)) is None:
            return known
    context = get_step_context()
    name = Path(plan.folder).name
    tags = {"ultrathink.workflow": name, "zenml.pipeline_run": context.pipeline_run.name}
    run_id = create_parent_run(plan.config, name, tags)
    if run_id:
        _write(plan, WorkflowRecord(mlflow_run_id=run_id))
    return run_id


def _read(plan: StepPlan) -> WorkflowRecord | None:
    try:
        content = RemoteFolder(plan.remote).read(RECORD_NAME) if plan.remote else None
        return WorkflowRecord.model_validate_json(content or (Path(plan.folder) / RECORD_NAME).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _write(plan: StepPlan, record: WorkflowRecord) -> None:
    Path(plan.folder).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(plan.folder) / RECORD_NAME, record.model_dump_json(indent=2) + "\n")
    if plan.remote:
        upload(Path(plan.folder), plan.remote, (RECORD_NAME,))
