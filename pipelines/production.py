"""Workflow 2: a dense baseline, then experts and the reasoning engine on it, then alignment."""

from zenml import pipeline
from zenml.enums import ExecutionMode

from pipelines.planning import begin
from steps.evaluate import evaluate
from steps.export import export
from steps.prepare_data import prepare_data
from steps.pretrain import pretrain
from steps.report import report
from steps.resume import resume
from steps.rlhf import rlhf


@pipeline(name="production_pipeline", execution_mode=ExecutionMode.FAIL_FAST)
def production_pipeline(
    profile: str | None = None, config: str | None = None, overrides: list[str] | None = None
) -> None:
    """Prepares data, trains in three stages, evaluates each, exports the last and reports.

    Args:
        profile: `auto` (also when neither it nor `config` is given), `tiny`, `small`, `medium` or `large`.
        config: A config file in place of a profile's.
        overrides: Each `section.key=value`, or `stage:section.key=value` for one stage.
    """
    plan = begin("production", profile, config, overrides)
    data = prepare_data(plan["prepare_data"], id="prepare_data")
    baseline = pretrain(plan["baseline"], data, id="baseline")
    advanced = resume(plan["advanced"], data, baseline, id="advanced")
    aligned = rlhf(plan["rlhf"], data, advanced, id="rlhf")
    evaluations = [
        evaluate(plan["evaluate_baseline"], data, baseline, id="evaluate_baseline", after=["rlhf"]),
        evaluate(plan["evaluate_advanced"], data, advanced, id="evaluate_advanced", after=["evaluate_baseline"]),
        evaluate(plan["evaluate_rlhf"], data, aligned, id="evaluate_rlhf", after=["evaluate_advanced"]),
    ]
    exported = export(plan["export"], aligned, evaluations[-1], id="export")
    report(plan["report"], [baseline, advanced, aligned], evaluations, exported, id="report")
