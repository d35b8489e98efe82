"""The step that measures a trained stage."""

from typing import Annotated

from zenml import step

from steps.caching import EVALUATE
from steps.parent_run import parent_run
from steps.references import DataReference, EvaluationReference, StageReference, hash_files, publish
from ultrathink_model.data.manifest import load_manifest
from ultrathink_model.stage import evaluate_stage
from ultrathink_model.workflow import StepPlan

RESULT_FILES = ("evaluation.json", "report.html")
ADDED_FILES = (*RESULT_FILES, "samples.json", "samples.jsonl", "metrics.jsonl", "mlflow.json")


@step(cache_policy=EVALUATE)
def evaluate(
    plan: StepPlan, data: DataReference, stage: StageReference
) -> Annotated[EvaluationReference, "evaluation"]:
    """Evaluates a stage's model on held-out text, beside n-gram models, and writes the stage's report."""
    print(f"{plan.title}: {stage.final_model}", flush=True)
    stage.fetch()
    with parent_run(plan):
        result = evaluate_stage(plan.config, load_manifest(data.fetch().folder), stage.name)
    print(f"{plan.title}: {_summary(result.metrics)}", flush=True)
    return EvaluationReference(
        **publish(plan, stage.folder, ADDED_FILES),
        files=RESULT_FILES,
        sha256=hash_files(stage.folder, RESULT_FILES),
        name=stage.name,
        metrics=result.metrics,
        mlflow_run_id=stage.mlflow_run_id,
    )


def _summary(metrics: dict[str, float]) -> str:
    """The loss, and bits per byte beside those of the n-gram models."""
    bits = {name.split("/")[1]: value for name, value in metrics.items() if name.endswith("/bits_per_byte")}
    others = ", ".join(f"{name} {value:.3f}" for name, value in bits.items() if name != "validation")
    return f"validation loss {metrics['eval/validation/loss']:.4f}, {bits['validation']:.3f} bits per byte ({others})"
