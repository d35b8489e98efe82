"""The step that writes the report over all stages."""

from pathlib import Path
from typing import Annotated

from zenml import step
from zenml.types import HTMLString

from steps.caching import REPORT
from steps.parent_run import finish_parent_run, parent_run
from steps.references import (
    EvaluationReference,
    ExportReference,
    GateReference,
    ReportReference,
    StageReference,
    hash_files,
    publish,
)
from ultrathink_model.reporting import write_report
from ultrathink_model.workflow import StepPlan

FILE_NAME = "report.html"


@step(cache_policy=REPORT)
def report(
    plan: StepPlan,
    stages: list[StageReference],
    evaluations: list[EvaluationReference],
    exported: ExportReference,
    decision: GateReference | None = None,
) -> tuple[Annotated[ReportReference, "report"], Annotated[HTMLString, "report_page"]]:
    """Writes one page over all stages, which ZenML's dashboard shows too, and closes the workflow's MLflow run."""
    folder = Path(plan.folder)
    print(f"{plan.title}: {folder / FILE_NAME}", flush=True)
    title = f"{folder.name} · {Path(plan.folder).parent.name}"
    for part in (*evaluations, *([decision] if decision else [])):
        part.fetch()
    page = write_report([stage.fetch().folder for stage in stages], folder / FILE_NAME, title)
    with parent_run(plan) as run_id:
        if run_id:
            exported.fetch()
            last = evaluations[-1]
            artifacts = [page, exported.folder / "export", last.folder / "config.yaml", last.folder / "evaluation.json"]
            finish_parent_run(plan, run_id, last, artifacts)
    reference = ReportReference(
        **publish(plan, folder, (FILE_NAME,)), files=(FILE_NAME,), sha256=hash_files(folder, (FILE_NAME,))
    )
    return reference, HTMLString(page.read_text(encoding="utf-8"))
