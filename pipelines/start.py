"""How a pipeline is started from a command line: `run.py`, or `zenml pipeline run NAME`."""

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from zenml.client import Client
from zenml.config.schedule import Schedule
from zenml.enums import ExecutionMode
from zenml.exceptions import RunInterruptedException
from zenml.models import PipelineRunResponse
from zenml.pipelines.pipeline_definition import Pipeline
from zenml.utils import source_utils

from pipelines.multi_gpu import multi_gpu_pipeline
from pipelines.production import production_pipeline
from pipelines.prototype import prototype_pipeline
from pipelines.quiet import quiet_zenml
from pipelines.run_settings import find_run_settings, read_run_settings, to_zenml
from pipelines.schedules import schedule_expression
from pipelines.stack_files import find_stack
from ultrathink_model.errors import EXIT_STOPPED_AFTER_SAVING, ConfigError, TrainingStoppedError, UltrathinkError
from ultrathink_model.workflow import WorkflowPlan

ROOT = Path(__file__).resolve().parents[1]

PIPELINES = {
    "prototype": prototype_pipeline,
    "production": production_pipeline,
    "multi_gpu": multi_gpu_pipeline,
}


def run_workflow(
    plan: WorkflowPlan,
    profile: str | None,
    config: str | None,
    overrides: Sequence[str],
    stack: str | None = None,
    run_settings: str | None = None,
    schedule: str | None = None,
) -> None:
    """Runs a workflow and says where its results are.

    Args:
        plan: What `plan_workflow` makes of the arguments that follow.
        profile: As `plan_workflow` takes it.
        config: As `plan_workflow` takes it.
        overrides: As `plan_workflow` takes them.
        stack: Name of the ZenML stack to run on; None takes the active one.
        run_settings: File of the steps' machines, images, retries; None takes the stack's shipped one.
        schedule: A cron expression; None runs at once.

    Raises:
        UltrathinkError: What a step raised, or an unknown stack.
        TrainingStoppedError: A signal stopped the run.
    """
    # Without this ZenML takes a `.zen` folder in some parent folder for the root of the code.
    source_utils.set_custom_source_root(str(ROOT))
    quiet_zenml()
    if stack:
        os.environ["ZENML_ACTIVE_STACK_ID"] = str(find_stack(stack).id)  # of this process alone
    pipeline = configured(plan, run_settings, schedule)
    try:
        run = pipeline(profile=profile, config=config, overrides=list(overrides))
    except RunInterruptedException:
        raise TrainingStoppedError("stopped by a signal; start the same command again to go on.") from None
    print(describe_results(plan, run), flush=True)


def configured(plan: WorkflowPlan, run_settings: str | None, schedule: str | None = None) -> Pipeline:
    """The workflow's pipeline with the run settings of the active stack, and a schedule where one is given.

    Raises:
        ConfigError: The settings do not fit the orchestrator, or it has no schedules.
    """
    stack = Client().active_stack
    options = _options(run_settings, plan.steps)
    if schedule:
        if not stack.orchestrator.config.is_schedulable:
            raise ConfigError(
                f"--schedule {schedule}: the orchestrator {stack.orchestrator.flavor} of stack {stack.name} has no "
                "schedules; take a stack of SageMaker, Vertex AI or Kubernetes, or cron on this machine."
            )
        options["schedule"] = Schedule(cron_expression=schedule_expression(schedule, stack.orchestrator.flavor))
    return PIPELINES[plan.workflow].with_options(**options, execution_mode=_execution_mode())


def _options(run_settings: str | None, steps: Iterable[str]) -> dict[str, Any]:
    """Run settings, from a file or the active stack's own, in the words of its orchestrator."""
    stack = Client().active_stack
    settings = read_run_settings(Path(run_settings)) if run_settings else find_run_settings(stack.name)
    return to_zenml(settings, stack.orchestrator.flavor, steps)


def _execution_mode() -> ExecutionMode:
    """Ours ends a run at its first failure; clouds know only their own way, in which what does not need it goes on."""
    supported = Client().active_stack.orchestrator.supported_execution_modes
    return ExecutionMode.FAIL_FAST if ExecutionMode.FAIL_FAST in supported else ExecutionMode.CONTINUE_ON_FAILURE


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


class _CommandPipeline(Pipeline):
    """A pipeline with its stack's run settings, that ends with a message and an exit code where ours would raise.

    What a YAML file of ZenML's says wins over the run settings.
    """

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        super().prepare(*args, **kwargs)
        options = _options(None, self.invocations)
        self.configure(settings=options.get("settings"), execution_mode=_execution_mode())
        for name, step_options in options.get("steps", {}).items():
            invocation = self.invocations[name]
            invocation.step = invocation.step.with_options(**step_options)

    def __call__(self, *args: Any, **kwargs: Any) -> PipelineRunResponse | None:
        try:
            return super().__call__(*args, **kwargs)
        except UltrathinkError as error:
            print(error, file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        except RunInterruptedException:
            print("stopped by a signal; start the same command again to go on.", file=sys.stderr)
            raise SystemExit(EXIT_STOPPED_AFTER_SAVING) from None
