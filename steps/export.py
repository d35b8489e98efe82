"""The step that exports the last stage's model."""

from pathlib import Path
from typing import Annotated

from zenml import step

from steps.caching import EXPORT
from steps.references import EvaluationReference, ExportReference, StageReference, hash_files, publish
from ultrathink_model.export.export import export_model
from ultrathink_model.workflow import StepPlan

FOLDER_NAME = "export"


@step(cache_policy=EXPORT)
def export(
    plan: StepPlan, stage: StageReference, evaluation: EvaluationReference
) -> Annotated[ExportReference, "export"]:
    """Exports a stage's model in the formats of `export.formats`, each loaded once in a clean process.

    Args:
        plan: Names the workflow's folder, which the export goes into.
        stage: The model.
        evaluation: Its evaluation, which the model card tells of.
    """
    folder = Path(plan.folder)
    print(f"{plan.title}: {folder / FOLDER_NAME}", flush=True)
    export_model(stage.fetch().final_model, folder / FOLDER_NAME, plan.config.export)
    return ExportReference(
        **publish(plan, folder, (FOLDER_NAME,)), files=(FOLDER_NAME,), sha256=hash_files(folder, (FOLDER_NAME,))
    )
