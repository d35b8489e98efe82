"""The step that decides whether a workflow's model may go into production."""

from typing import Annotated

from zenml import step

from steps.references import EvaluationReference, GateReference, hash_files, publish
from ultrathink_model.promotion.promote import judge_run
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.workflow import StepPlan

RESULT_FILES = ("gates.json",)


# Never from the cache: what is in production now is no input that ZenML could compare.
@step(enable_cache=False)
def gate(plan: StepPlan, evaluation: EvaluationReference) -> Annotated[GateReference, "gate"]:
    """Compares a stage's model with its gates and with the model in production; the step `promote` acts on it."""
    folder = evaluation.fetch().folder
    decision = judge_run(RunFolder(folder), plan.config)
    print(f"{plan.title}: {decision.reason}", flush=True)
    return GateReference(
        **publish(plan, folder, RESULT_FILES),
        files=RESULT_FILES,
        sha256=hash_files(folder, RESULT_FILES),
        passed=decision.passed,
        reason=decision.reason,
    )
