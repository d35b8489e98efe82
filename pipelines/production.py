"""Workflow 2: a dense baseline, then experts and the reasoning engine on it, then alignment, in one stage or two."""

from zenml import pipeline
from zenml.enums import ExecutionMode

from pipelines.planning import begin
from steps.constitutional import constitutional
from steps.evaluate import evaluate
from steps.export import export
from steps.failure import note_failure
from steps.gate import gate
from steps.prepare_data import prepare_data
from steps.pretrain import pretrain
from steps.promote import promote
from steps.report import report
from steps.resume import resume
from steps.reward import reward
from steps.rlhf import rlhf


@pipeline(name="production_pipeline", execution_mode=ExecutionMode.FAIL_FAST, on_failure=note_failure)
def production_pipeline(
    profile: str | None = None, config: str | None = None, overrides: list[str] | None = None
) -> None:
    """Prepares data, trains a baseline, adds features to it, aligns it, evaluates each model, exports the last, reports, promotes.

    With `advanced.enable_constitutional` or `constitutional.enabled` there is a stage of Constitutional AI before
    alignment, whose preferences the reward model then learns from. The gate decides before anything is registered; a
    model that does not pass it is exported and reported all the same, and then the run ends with exit code 3.

    Args:
        profile: `auto` (also when neither it nor `config` is given), `tiny`, `small`, `medium` or `large`.
        config: A config file in place of a profile's.
        overrides: Each `section.key=value`, or `stage:section.key=value` for one stage.
    """
    plan = begin("production", profile, config, overrides)
    data, _ = prepare_data(plan["prepare_data"], id="prepare_data")
    baseline = pretrain(plan["baseline"], data, id="baseline")
    advanced = resume(plan["advanced"], data, baseline, id="advanced")
    stages = {"baseline": baseline, "advanced": advanced}
    if "constitutional" in plan.steps:
        stages["constitutional"] = constitutional(plan["constitutional"], data, advanced, id="constitutional")
    start = list(stages.values())[-1]
    rewards = reward(plan["reward"], data, start, id="reward") if "reward" in plan.steps else None
    stages["rlhf"] = rlhf(plan["rlhf"], data, start, rewards, id="rlhf")
    evaluations, before = [], "rlhf"
    for name, stage in stages.items():
        step = f"evaluate_{name}"
        evaluations.append(evaluate(plan[step], data, stage, id=step, after=[before]))
        before = step
    decision = gate(plan["gate"], evaluations[-1], id="gate")
    exported = export(plan["export"], stages["rlhf"], evaluations[-1], id="export", after=["gate"])
    trained = [*stages.values()] if rewards is None else [*list(stages.values())[:-1], rewards, stages["rlhf"]]
    report(plan["report"], trained, evaluations, exported, decision, id="report")
    promote(plan["promote"], decision, evaluations[-1], exported, id="promote", after=["report"])
