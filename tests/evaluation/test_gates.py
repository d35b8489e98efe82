import pytest

from ultrathink_model.config import make_config, override_config
from ultrathink_model.errors import EXIT_GATE_NOT_MET, ConfigError, GateError
from ultrathink_model.evaluation.gates import check_gates
from ultrathink_model.stage import run_stage
from ultrathink_model.tracking.run_folder import RunIdentity
from ultrathink_model.workflow import plan_hash, plan_workflow

METRICS = {"eval/validation/loss": 2.0, "eval/safety/caught": 0.5, "rlhf/kl": float("nan")}


def test_bounds_that_are_kept_let_the_model_through():
    check_gates({"eval/validation/loss": "<= 2", "eval/safety/caught": ">=.5"}, METRICS, "run")
    check_gates({}, {}, "run")


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"eval/validation/loss": "<= 1.9"}, r"loss is 2, and evaluation\.gates asks for <= 1\.9"),
        ({"eval/safety/caught": ">= 0.6"}, "caught is 0.5"),
        ({"rlhf/kl": "<= 5"}, "kl is nan"),
        ({"eval/safety/auc_hate": ">= 0.9"}, r"not measured \(there is eval/safety/caught, eval/validation/loss\)"),
    ],
)
def test_bounds_that_are_not_kept_are_named_with_the_figure(gates, message):
    with pytest.raises(GateError, match=message) as error:
        check_gates(gates, METRICS, "run")
    assert error.value.exit_code == EXIT_GATE_NOT_MET


@pytest.mark.parametrize("bound", ["0.9", "< 0.9", ">= high", "~ 1"])
def test_bound_that_is_none_is_refused(bound):
    with pytest.raises(ConfigError, match="is no bound"):
        make_config({"evaluation": {"gates": {"eval/x": bound}}})


def test_stage_that_misses_its_gate_is_complete_and_passes_another_one_later(tiny_config):
    config = override_config(tiny_config, ["evaluation.gates={eval/validation/loss: '<= 0.1'}"])
    with pytest.raises(GateError, match="run does not pass"):
        run_stage(config, run_name="run")
    again = override_config(tiny_config, ["evaluation.gates={eval/validation/loss: '<= 100', train/loss: '<= 100'}"])
    assert RunIdentity.of(config, "run") == RunIdentity.of(again, "run")
    assert run_stage(again, run_name="run").steps == 6


def test_moved_gate_evaluates_anew_and_trains_nothing():
    before = plan_workflow("production", "tiny")
    after = plan_workflow("production", "tiny", overrides=["rlhf:evaluation.gates={eval/validation/loss: '<= 4'}"])
    changed = {name for name in before.steps if plan_hash(before[name]) != plan_hash(after[name])}
    assert changed == {"evaluate_rlhf"}
