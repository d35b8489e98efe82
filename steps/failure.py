"""What a failed step leaves on its ZenML run: the reason, the end of the log, and the command that goes on."""

import logging
import shlex
from pathlib import Path
from typing import Any

from zenml import get_step_context, log_metadata
from zenml.exceptions import RunInterruptedException

from ultrathink_model.errors import TrainingStoppedError
from ultrathink_model.tracking.run_folder import RunFolder

LOG_LINES = 30
KEY = "failure"

logger = logging.getLogger(__name__)


def note_failure(error: BaseException) -> None:
    """Leaves on the pipeline run, under `failure`, why a step failed and how to go on. ZenML calls it."""
    context = get_step_context()
    run, step = context.pipeline_run, context.step_run
    plan = step.config.parameters.get("plan", {})
    is_stop = isinstance(error, TrainingStoppedError | RunInterruptedException | KeyboardInterrupt)
    note: dict[str, Any] = {
        "step": step.name,
        "reason": f"{'stopped' if is_stop else type(error).__name__}: {error}",
        "log_tail": log_tail(plan),
        "resume_command": resume_command(
            run.config.name, run.config.parameters or {}, run.stack.name if run.stack else None
        ),
    }
    log_metadata(metadata={KEY: {name: str(value) for name, value in note.items()}}, run_id_name_or_prefix=run.id)


def log_tail(plan: dict[str, Any]) -> str:
    """The last lines of a stage's own log; empty for a step that has none."""
    folder = plan.get("config", {}).get("output", {}).get("output_dir")
    file = RunFolder(Path(folder)).log_file if folder else None
    if file is None or not file.is_file():
        return ""
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])


def resume_command(pipeline: str, parameters: dict[str, Any], stack: str | None) -> str:
    """The command line that starts a run's workflow again; finished steps come from the cache."""
    words = ["python", "run.py", "--workflow", pipeline.removesuffix("_pipeline")]
    for name in ("profile", "config"):
        if parameters.get(name):
            words += [f"--{name}", str(parameters[name])]
    if stack and stack != "default":
        words += ["--stack", stack]
    if parameters.get("overrides"):
        words += ["--override", *map(str, parameters["overrides"])]
    return shlex.join(words)
