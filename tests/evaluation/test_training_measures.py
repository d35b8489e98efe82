"""Measures of the finished model, taken at validations on the way."""

import json

import pytest

from ultrathink_model.config import make_config, override_config
from ultrathink_model.errors import ConfigError
from ultrathink_model.stage import run_stage
from ultrathink_model.tracking.metrics import read_metrics
from ultrathink_model.tracking.run_folder import RunFolder, RunIdentity


def test_measures_are_logged_at_each_validation_and_leave_training_alone(tiny_config, tmp_path):
    (tmp_path / "blimp").mkdir()
    pair = {"sentence_good": "the ship sailed", "sentence_bad": "ship the sailed"}
    (tmp_path / "blimp" / "order.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
    plain = override_config(tiny_config, ["evaluation.eval_steps=2", "evaluation.eval_samples=4"])
    run_stage(plain, run_name="plain", evaluate=False)
    measured = override_config(
        plain,
        [
            f"output.output_dir={tmp_path / 'measured'}",
            f"evaluation.blimp={tmp_path / 'blimp'}",
            "evaluation.training_measures=[blimp, calibration, context]",
        ],
    )
    run_stage(measured, run_name="measured", evaluate=False)
    rows = {row["step"]: row for row in read_metrics(RunFolder(measured.output.output_dir).metrics_file)}
    names = ("eval/blimp/accuracy", "eval/validation/calibration_error", "eval/context/loss_from_0")
    assert [step for step, row in rows.items() if all(name in row for name in names)] == [2, 4, 6]
    losses = [
        [row["train/loss"] for row in read_metrics(RunFolder(config.output.output_dir).metrics_file)]
        for config in (plain, measured)
    ]
    assert losses[0] == losses[1]


def test_what_only_the_finished_model_is_measured_with_is_no_part_of_a_run(tiny_config):
    more = ["evaluation.tasks=[hellaswag]", "evaluation.blimp=somewhere", "evaluation.context_length=64"]
    changed = override_config(tiny_config, more)
    assert RunIdentity.of(changed, "run") == RunIdentity.of(tiny_config, "run")
    measuring = override_config(changed, ["evaluation.training_measures=[context]"])
    assert RunIdentity.of(measuring, "run") != RunIdentity.of(changed, "run")


def test_blimp_while_training_needs_its_folder():
    with pytest.raises(ConfigError, match=r"evaluation\.blimp is null"):
        make_config({"evaluation": {"training_measures": ["blimp"]}})
