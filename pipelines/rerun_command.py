"""`run.py rerun`: starts a run's workflow again with the same settings; what has not changed comes from the cache."""

from datetime import timedelta
from typing import Any

from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.models import PipelineRunResponse
from zenml.utils.pagination_utils import depaginate
from zenml.utils.time_utils import utc_now

from pipelines.quiet import quiet_zenml
from pipelines.start import run_workflow
from ultrathink_model.command_line import ArgumentParser
from ultrathink_model.errors import ConfigError
from ultrathink_model.workflow import WORKFLOWS, plan_workflow


def make_parser() -> ArgumentParser:
    """The flags of `run.py rerun`."""
    parser = ArgumentParser(prog="run.py rerun", description=__doc__ or "")
    parser.add_argument("run", metavar="RUN", help="name or id of a run, as run.py status lists them")
    parser.add_argument("--from", dest="first", metavar="STEP", help="do this step and what follows anew")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as --override, on top of the run's"
    )
    parser.add_argument("--stack", metavar="NAME", help="another stack than the run's")
    parser.add_argument("--run-settings", metavar="FILE", help="as run.py takes it")
    return parser


def main(arguments: list[str]) -> None:
    """Runs the workflow of an earlier run again.

    Raises:
        ConfigError: There is no such run or step, or the settings cannot be used.
        UltrathinkError: What a step raised.
    """
    given = make_parser().parse_args(arguments)
    quiet_zenml()
    run = find_run(given.run)
    workflow = run.config.name.removesuffix("_pipeline")
    parameters: dict[str, Any] = run.config.parameters or {}
    profile, config = parameters.get("profile"), parameters.get("config")
    overrides = [*(parameters.get("overrides") or []), *given.set]
    if given.first:
        overrides += start_anew(run, workflow, given.first)
    stack = given.stack or (run.stack.name if run.stack else None)
    plan = plan_workflow(workflow, profile, config, overrides)
    run_workflow(plan, profile, config, overrides, stack, given.run_settings)


def find_run(name: str) -> PipelineRunResponse:
    """The run of a workflow by its name, its id or the beginning of one.

    Raises:
        ConfigError: There is none, or several.
    """
    try:
        run = Client().get_pipeline_run(name)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"rerun {name}: {error}; `python run.py status` lists the runs.") from None
    if run.config.name.removesuffix("_pipeline") not in WORKFLOWS:
        raise ConfigError(f"rerun {name}: it is a run of {run.config.name}, which is no workflow of ours.")
    return run


def start_anew(run: PipelineRunResponse, workflow: str, first: str) -> list[str]:
    """Has a step and those after it done again: ZenML forgets its results, and a stage that trains begins at step 0.

    Returns:
        Overrides that the next run needs for it.

    Raises:
        ConfigError: The run has no such step.
    """
    steps = run.snapshot.step_configurations if run.snapshot else {}
    names = [name for name in WORKFLOWS[workflow].steps if name in steps]
    if first not in names:
        raise ConfigError(f"--from {first}: the run has no such step; it has {', '.join(names)}.")
    anew = names[names.index(first) :]
    plans = {name: step.config.parameters["plan"] for name, step in steps.items()}
    client = Client()
    for name in anew:
        known = depaginate(
            client.list_run_steps, name=name, status=ExecutionStatus.COMPLETED, cache_expired=False, hydrate=True
        )
        for step in known:
            plan = step.config.parameters.get("plan", {})
            if (plan.get("folder"), plan.get("remote")) == (plans[name]["folder"], plans[name]["remote"]):
                client.update_step_run(step.id, cache_expires_at=utc_now() - timedelta(seconds=1))
    stages = [stage.name for stage in WORKFLOWS[workflow].stages]
    return [f"{name}:training.resume=never" for name in anew if name in stages]
