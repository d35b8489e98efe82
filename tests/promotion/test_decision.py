import pytest

from ultrathink_model.config.gates import Gate, read_gates
from ultrathink_model.errors import EXIT_GATE_NOT_MET, ConfigError, GateError
from ultrathink_model.promotion.decision import Decision, decide

LOSS = Gate(metric="eval/validation/loss", direction="lower", bound=4.0, allowed_regression=0.1)
ACCURACY = Gate(metric="eval/blimp/accuracy", direction="higher", bound=0.5, allowed_regression=0.02)


def verdict(gate, value, before=None):
    metrics = {} if value is None else {gate.metric: value}
    production = None if before is None else {gate.metric: before}
    return decide([gate], metrics, production, name="rlhf", production_version=3 if production else None)


@pytest.mark.parametrize(
    ("gate", "value", "before"),
    [(LOSS, 4.0, None), (LOSS, 3.5, 3.45), (LOSS, 3.0, 3.9), (ACCURACY, 0.5, None), (ACCURACY, 0.66, 0.67)],
)
def test_what_keeps_bound_and_allowed_regression_passes(gate, value, before):
    decision = verdict(gate, value, before)
    assert decision.passed
    decision.check()


@pytest.mark.parametrize(
    ("gate", "value", "before", "reason"),
    [
        (LOSS, 4.1, None, "loss is 4.1, above the bound of 4"),
        (LOSS, 3.5, 3.2, "loss is 3.5, 0.3 worse than the 3.2 of version 3 in production, and 0.1 is allowed"),
        (ACCURACY, 0.4, None, "accuracy is 0.4, below the bound of 0.5"),
        (ACCURACY, 0.6, 0.7, "accuracy is 0.6, 0.1 worse than the 0.7 of version 3 in production, and 0.02 is allowed"),
        (LOSS, None, None, "loss was not measured"),
        (LOSS, float("nan"), 3.0, "loss is not a number"),
        (LOSS, float("inf"), None, "loss is inf, above the bound"),
    ],
)
def test_what_does_not_is_refused_in_one_line_with_the_figures(gate, value, before, reason):
    with pytest.raises(GateError) as refusal:
        verdict(gate, value, before).check()
    assert refusal.value.exit_code == EXIT_GATE_NOT_MET
    assert str(refusal.value).startswith("rlhf is not promoted: eval/")
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_metric_that_production_lacks_has_nothing_to_fall_behind():
    assert decide([ACCURACY], {ACCURACY.metric: 0.6}, {}, name="rlhf", production_version=1).passed


def test_a_gate_of_what_is_measured_counts_where_the_model_or_production_has_it():
    caught = Gate(metric="eval/safety/caught", direction="higher", allowed_regression=0.05, where_measured=True)
    assert decide([caught, LOSS], {LOSS.metric: 3.0}, None, name="plain").verdicts[0].gate == LOSS
    assert verdict(caught, 0.9).passed
    assert verdict(caught, 0.86, 0.9).passed
    assert not verdict(caught, 0.8, 0.9).passed
    reason = decide([caught], {}, {caught.metric: 0.9}, name="rlhf", production_version=3).reason
    assert "caught was not measured, and was 0.9 of version 3 in production" in reason


def test_the_gates_that_come_with_the_project_watch_over_harm():
    gates = read_gates(None)
    before = {"eval/validation/bits_per_byte": 1.5, "eval/safety/harmful_after": 0.1}
    for harmful, passes in ((0.12, True), (0.3, False)):
        found = decide(gates, before | {"eval/safety/harmful_after": harmful}, before, name="rlhf")
        assert found.passed is passes


def test_a_decision_can_be_kept_and_read(tmp_path):
    decision = decide([LOSS, ACCURACY], {LOSS.metric: float("inf")}, None, name="rlhf")
    decision.save(tmp_path / "gates.json")
    assert Decision.load(tmp_path / "gates.json") == decision


def test_the_gates_that_come_with_the_project_are_gates():
    bits, *harm = read_gates(None)
    assert bits.metric == "eval/validation/bits_per_byte"
    assert not bits.where_measured
    assert all(gate.metric.startswith("eval/safety/") and gate.where_measured for gate in harm)
    assert len(harm) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{metric: a, direction: down, bound: 1}]", "direction"),
        ("[{metric: a, direction: lower}]", "neither bound nor allowed_regression"),
        ("[{metric: a, direction: lower, bound: 1, limit: 2}]", "limit"),
        ("[{metric: a, direction: lower, allowed_regression: -1}]", "allowed_regression"),
        ("gates: 1", "the file|list"),
        ("[", "is not YAML"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, message):
    (tmp_path / "gates.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_gates(str(tmp_path / "gates.yaml"))
