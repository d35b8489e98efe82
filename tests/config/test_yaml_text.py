import pytest
import yaml

from ultrathink_model.config import load_config
from ultrathink_model.config.yaml_text import read_yaml
from ultrathink_model.errors import ConfigError


def test_a_key_that_stands_twice_is_named_with_both_lines():
    with pytest.raises(yaml.YAMLError, match="the key b stands in line 2 and again in line 4; keep one"):
        read_yaml("a: {b: 1}\nb: 2\nc: 3\nb: 4\n")
    with pytest.raises(yaml.YAMLError, match="the key size stands in line 2"):
        read_yaml("- model:\n    size: 1\n    size: 1\n")


def test_the_same_key_in_two_mappings_and_a_merge_are_well():
    assert read_yaml("a: {x: 1}\nb: {x: 2}\n") == {"a": {"x": 1}, "b": {"x": 2}}
    merged = "base: &base {x: 1, y: 2}\nother: {<<: *base, y: 3}\n"
    assert read_yaml(merged)["other"] == {"x": 1, "y": 3}


def test_no_object_of_python_is_made():
    with pytest.raises(yaml.YAMLError):
        read_yaml("!!python/object/apply:os.getcwd []")


def test_a_config_with_a_section_twice_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("training:\n  batch_size: 2\ndata: {}\ntraining:\n  max_steps: 3\n")
    with pytest.raises(ConfigError, match="the key training stands in line 1 and again in line 4"):
        load_config(tmp_path / "run.yaml")
