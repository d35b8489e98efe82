"""`run.py status`: the last runs, their stages, where they write, and how to go on; closes what a kill left "running"."""

from zenml.client import Client
from zenml.models import PipelineRunResponse

from pipelines.abandoned import PIPELINE_NAMES, close, is_abandoned, plan_of
from pipelines.quiet import quiet_zenml
from steps.failure import KEY
from ultrathink_model.command_line import ArgumentParser

SIGNS = {"completed": "+", "cached": "=", "running": ">", "failed": "!", "stopped": "!"}


def make_parser() -> ArgumentParser:
    """The flags of `run.py status`."""
    parser = ArgumentParser(prog="run.py status", description=__doc__ or "")
    parser.add_argument("--last", type=int, default=5, metavar="N", help="how many runs of each workflow; 5")
    return parser


def main(arguments: list[str]) -> None:
    """Prints the last runs of each workflow, newest first."""
    given = make_parser().parse_args(arguments)
    quiet_zenml()
    found = False
    for pipeline in PIPELINE_NAMES:
        runs = Client().list_pipeline_runs(
            pipeline_name=pipeline, sort_by="desc:created", size=max(given.last, 1), hydrate=True
        )
        for run in runs.items:
            found = True
            print(describe(run))
    if not found:
        print("no workflow has run yet: python run.py --workflow prototype")


def describe(run: PipelineRunResponse) -> str:
    """A run as lines of text; one that is abandoned is closed first."""
    lines = []
    if is_abandoned(run):
        close(run)
        run = Client().get_pipeline_run(run.id)
        lines.append("  was cut off by a kill, and is shown as failed from now on")
    plan = plan_of(run)
    stack = run.stack.name if run.stack else "a stack that is gone"
    steps = sorted(run.steps.values(), key=lambda step: step.config.parameters.get("plan", {}).get("number", 0))
    stages = " ".join(f"{SIGNS.get(step.status.value, '?')}{step.name}" for step in steps)
    lines.append(f"  {stages or 'no step has begun'}   (+ done, = cached, > running, ! failed)")
    lines.append(f"  in {plan.get('remote') or plan.get('folder', 'an unknown folder')}, on {stack}")
    failure = run.run_metadata.get(KEY)
    if isinstance(failure, dict):
        lines.append(f"  {failure['step']}: {failure['reason']}")
        lines.append(f"  go on: {failure['resume_command']}")
    elif not run.status.is_successful and run.status.is_finished:
        lines.append(f"  again: python run.py rerun {run.name}")
    started = f"{run.start_time:%Y-%m-%d %H:%M}" if run.start_time else "not started"
    return "\n".join([f"{run.name}: {run.status.value}, {started}", *lines])
