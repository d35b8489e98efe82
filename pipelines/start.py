"""How a pipeline is started from a command line: `run.py`, or `zenml pipeline run NAME`."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zenml.client import Client
from zenml.exceptions import RunInterruptedException
from zenml.models import PipelineRunResponse
from zenml.pipelines.pipeline_definition import Pipeline
from zenml.utils import source_utils

from pipelines.multi_gpu import multi_gpu_pipeline
from pipelines.production import production_pipeline
from pipelines.prototype import prototype_pipeline
from ultrathink_model.errors import EXIT_STOPPED_AFTER_SAVING, ConfigError, TrainingStoppedError, UltrathinkError
from ultrathink_model.workflow import WorkflowPlan

ROOT = Path(__file__).resolve().parents[1]

PIPELINES = {
    "prototype": prototype_pipeline,
    "production": production_pipeline,
    "multi_gpu": multi_gpu_pipeline,
}

# At INFO these speak of ZenML itself, the others of the run.
QUIET_LOGGERS = ("zenml.pipelines", "zenml.zen_stores", "zenml.config", "zenml.client", "zenml.utils")


def run_workflow(
    plan: WorkflowPlan, profile: str | None, config: str | None, overrides: Sequence[str], stack: str | None = None
) -> None:
    """Runs a workflow and says where its results are.

    Args:
        plan: What `plan_workflow` makes of the arguments that follow.
        profile: As `plan_workflow` takes it.
        config: As `plan_workflow` takes it.
        overrides: As `plan_workflow` takes them.
        stack: Name of the ZenML stack to run on; None takes the active one.

    Raises:
        UltrathinkError: What a step raised, or an unknown stack.
        TrainingStoppedError: A signal stopped the run.
    """
    # Without this ZenML takes a `.zen` folder in some parent folder for the root of the code.
    source_utils.set_custom_source_root(str(ROOT))
    quiet_zenml()
    if stack:
        _choose_stack(stack)
    try:
        run = PIPELINES[plan.workflow](profile=profile, config=config, overrides=list(overrides))
    except RunInterruptedException:
        raise TrainingStoppedError("stopped by a signal; start the same command again to go on.") from None
    print(describe_results(plan, run), flush=True)


def describe_results(plan: WorkflowPlan, run: PipelineRunResponse | None) -> str:
    """Where the results of a run are, and how to look at them; where to look for a run that is still under way."""
    if run is None or not run.status.is_finished:
        return f"Submitted{f' as {run.name}' if run else ''}; follow it on the ZenML dashboard."
    logging_config = plan.config.logging
    program = Path(sys.executable).parent
    rows = {
        "report": f"{plan.folder / 'report.html'}  (open it in a browser)",
        "model": f"{plan.folder / 'export'}  (AutoModelForCausalLM.from_pretrained takes it)",
        "stages": f"{plan.folder}/<stage>/final_model  (what --init-from takes)",
        "MLflow": f"{program / 'mlflow'} ui --backend-store-uri {logging_config.mlflow_tracking_uri}",
        "ZenML": f"{program / 'zenml'} login --local",
    }
    if not logging_config.use_mlflow:
        del rows["MLflow"]
    return "\n".join([f"Done: {plan.workflow} ({run.name})", *(f"  {name:8}{text}" for name, text in rows.items())])


def as_command(pipeline: Pipeline) -> Pipeline:
    """The pipeline as `zenml pipeline run` should have it: with errors as messages and exit codes of our own."""
    quiet_zenml()
    pipeline.__class__ = _CommandPipeline
    return pipeline


def quiet_zenml() -> None:
    """Keeps from the terminal what ZenML logs about itself, and its tracebacks of a user's mistakes."""
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for handler in logging.getLogger().handlers:
        if not any(isinstance(known, _WithoutUserErrors) for known in handler.filters):
            handler.addFilter(_WithoutUserErrors())


class _CommandPipeline(Pipeline):
    """A pipeline that ends the process with a message and an exit code where ours would raise."""

    def __call__(self, *args: Any, **kwargs: Any) -> PipelineRunResponse | None:
        try:
            return super().__call__(*args, **kwargs)
        except UltrathinkError as error:
            print(error, file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        except RunInterruptedException:
            print("stopped by a signal; start the same command again to go on.", file=sys.stderr)
            raise SystemExit(EXIT_STOPPED_AFTER_SAVING) from None


class _WithoutUserErrors(logging.Filter):
    """Drops what ZenML logs about errors that the command line prints itself, once and without a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("zenml"):
            return True
        arguments = record.args if isinstance(record.args, tuple) else ()
        errors = (record.exc_info[1] if record.exc_info else None, *arguments)
        return not any(isinstance(error, UltrathinkError | RunInterruptedException) for error in errors)


def _choose_stack(name: str) -> None:
    """Makes a stack the active one of this process alone."""
    client = Client()
    try:
        stack = client.get_stack(name, allow_name_prefix_match=False)
    except KeyError:
        names = ", ".join(stack.name for stack in client.list_stacks(size=100).items)
        raise ConfigError(
            f"--stack {name} is not registered; there is {names}. "
            f"`zenml stack import {name} -f stack_configs/{name}.yaml` registers a shipped one."
        ) from None
    os.environ["ZENML_ACTIVE_STACK_ID"] = str(stack.id)
