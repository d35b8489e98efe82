"""What the steps that train have in common: where they go on, which MLflow run they belong to, what they pass on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from steps.failure import note_failure
from steps.parent_run import parent_run
from steps.provenance import PROVENANCE_NAME, note_result, settle_resume
from steps.references import DataReference, StageReference, hash_files, publish
from ultrathink_model.command_line import end_rank
from ultrathink_model.data.manifest import load_manifest
from ultrathink_model.errors import TrainingStoppedError
from ultrathink_model.stage import run_stage
from ultrathink_model.tracking.remote_folder import fetch_run
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.training.session import StagePlace
from ultrathink_model.workflow import StepPlan

# What later steps read of a run's folder. `metrics.jsonl` is not among it: evaluation adds its line there.
RESULT_FILES = ("config.yaml", "final_model")


def train_stage(
    plan: StepPlan,
    data: DataReference,
    code: str,
    initial: StageReference | None = None,
    files: tuple[str, ...] = RESULT_FILES,
) -> StageReference:
    """Trains the stage of a plan in its run's folder, or goes on with it there.

    Args:
        plan: The stage.
        data: What it learns from.
        code: Hash of the code that trains it.
        initial: The stage whose model it starts from; None starts from a seed.
        files: What makes the result, within the run's folder.
    """
    fetch_run(plan.config)
    config = settle_resume(plan.config, code)
    with _stops_end_the_machine(plan), parent_run(plan, trains=True) as parent:
        result = run_stage(
            config,
            manifest=load_manifest(data.fetch().folder),
            init_from=initial.fetch().final_model if initial else None,
            run_name=plan.name,
            place=StagePlace(number=plan.number, of=plan.of, parent_run_id=parent),
            evaluate=False,
        )
    folder = RunFolder(Path(config.output.output_dir))
    record = folder.record()
    assert record is not None, "run_stage leaves run.json"
    note_result(folder.path)
    return StageReference(
        **publish(plan, folder.path, (PROVENANCE_NAME,)),
        files=files,
        sha256=hash_files(folder.path, files),
        name=plan.name,
        step=result.steps,
        tokens=result.tokens,
        started_at=record.started_at,
        mlflow_run_id=record.mlflow_run_id,
    )


@contextmanager
def _stops_end_the_machine(plan: StepPlan) -> Iterator[None]:
    """Ends the process with exit code 75 after a signal, on a machine that the cloud takes back.

    ZenML would try the step again here, in the half minute that is left, before the cloud does so elsewhere.
    """
    try:
        yield
    except TrainingStoppedError as error:
        if plan.has_own_machine:
            note_failure(error)
            print(error, file=sys.stderr)
            end_rank(error.exit_code)
        raise
