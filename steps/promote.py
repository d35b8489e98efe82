"""The step that puts a workflow's model into production."""

from typing import Annotated

from zenml import step

from steps.caching import PROMOTE
from steps.parent_run import known_parent_run
from steps.references import EvaluationReference, ExportReference, GateReference
from ultrathink_model.promotion.decision import Decision
from ultrathink_model.promotion.promote import promote_run
from ultrathink_model.tracking.run_folder import RunFolder
from ultrathink_model.workflow import StepPlan


@step(cache_policy=PROMOTE)
def promote(
    plan: StepPlan, decision: GateReference, evaluation: EvaluationReference, exported: ExportReference
) -> Annotated[str, "production"]:
    """Registers the exported model with its lineage and gives it the alias `production`, if its gates let it.

    Returns:
        What became of it, in one line.

    Raises:
        GateError: The gates do not; nothing is registered.
    """
    run = RunFolder(evaluation.fetch().folder)
    found = Decision.load(decision.fetch().folder / "gates.json")
    found.check()
    if not plan.config.logging.use_mlflow:
        outcome = f"{found.reason} It is registered nowhere: logging.use_mlflow=false."
    else:
        model = exported.fetch().folder / "export"
        version = promote_run(run, plan.config, found, model, known_parent_run(plan))
        outcome = (
            f"{found.reason} Version {version.number} of {plan.config.promotion.registered_model} is in production."
        )
    print(f"{plan.title}: {outcome}", flush=True)
    return outcome
