import json

import pytest

from ultrathink_model.config import override_config
from ultrathink_model.errors import ConfigError


def test_the_steps_that_are_named_are_recorded(train_tiny, tmp_path):
    train_tiny("logging.profile_steps=[2,3]")
    folder = tmp_path / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["operators_rank0.txt", "trace_rank0.json"]
    trace = json.loads((folder / "trace_rank0.json").read_text())
    steps = [event for event in trace["traceEvents"] if "Optimizer.step" in event.get("name", "")]
    assert len(steps) == 2
    table = (folder / "operators_rank0.txt").read_text()
    assert "aten::mm" in table
    assert "CPU Mem" in table


def test_a_run_that_ends_before_the_last_step_leaves_what_it_has(train_tiny, tmp_path):
    train_tiny("logging.profile_steps=[5,99]")
    assert (tmp_path / "run" / "profile" / "trace_rank0.json").is_file()


def test_without_the_key_nothing_is_recorded(train_tiny, tmp_path):
    train_tiny("training.max_steps=2")
    assert not (tmp_path / "run" / "profile").exists()


@pytest.mark.parametrize("steps", ["[3,2]", "[0,2]"])
def test_steps_out_of_order_are_refused(base_config, steps):
    with pytest.raises(ConfigError, match=r"logging.profile_steps=.* first <= last"):
        override_config(base_config, [f"logging.profile_steps={steps}"])
