import json

import pytest
import torch

from ultrathink_model.config import override_config
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.distributed.deepspeed_config import deepspeed_config
from ultrathink_model.errors import ConfigError

TWO_CPU_RANKS = RankContext(0, 0, 2, torch.device("cpu"))
FOUR_GPU_RANKS = RankContext(0, 0, 4, torch.device("cuda", 0))


@pytest.fixture
def config(tiny_config):
    return override_config(
        tiny_config,
        [
            "distributed.enabled=true",
            "distributed.strategy=deepspeed",
            "training.batch_size=2",
            "training.global_batch_size=24",
            "training.gradient_clipping=0.7",
        ],
    )


def with_file(config, path, values):
    path.write_text(json.dumps(values))
    return override_config(config, [f"distributed.deepspeed_config={path}"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shipped_files_are_filled_from_our_config(config, stage):
    shipped = override_config(config, [f"distributed.deepspeed_config=configs/deepspeed_z{stage}.json"])
    settings = deepspeed_config(shipped, FOUR_GPU_RANKS)
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["train_batch_size"] == 24
    assert settings["gradient_clipping"] == 0.7
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "none"
    assert "auto" not in json.dumps(settings)


def test_stage_of_our_config_is_taken_without_a_file(config):
    settings = deepspeed_config(override_config(config, ["distributed.zero_stage=3"]), TWO_CPU_RANKS)
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["gradient_accumulation_steps"] == 6


def test_offload_is_for_machines_with_a_gpu(config):
    offloaded = override_config(config, ["distributed.cpu_offload=true"])
    assert deepspeed_config(offloaded, FOUR_GPU_RANKS)["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert deepspeed_config(offloaded, TWO_CPU_RANKS)["zero_optimization"]["offload_optimizer"]["device"] == "none"


def test_folder_that_the_guide_writes_is_read_as_ours(config, caplog):
    guide = override_config(config, ["distributed.deepspeed_config=config/deepspeed_z3.json"])
    assert deepspeed_config(guide, TWO_CPU_RANKS)["zero_optimization"]["stage"] == 3
    assert "config/deepspeed_z3.json does not exist; configs/deepspeed_z3.json is taken" in caplog.text


def test_missing_file_is_refused_with_the_shipped_ones(config):
    missing = override_config(config, ["distributed.deepspeed_config=elsewhere/mine.json"])
    with pytest.raises(ConfigError, match=r"elsewhere/mine.json is not a file.*deepspeed_z1.json"):
        deepspeed_config(missing, TWO_CPU_RANKS)


def test_file_that_is_not_json_is_refused(config, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    broken = override_config(config, [f"distributed.deepspeed_config={tmp_path / 'broken.json'}"])
    with pytest.raises(ConfigError, match="is not a JSON file"):
        deepspeed_config(broken, TWO_CPU_RANKS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu=4 contradicts.*makes it 2"),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0 contradicts.*makes it 0.7"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=True contradicts.*makes it False"),
        ({"optimizer": {"type": "Adam"}}, "the section optimizer is not read; set training.optimizer"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, 'reduce_bucket_size="auto" cannot be'),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage=0 is not 1, 2 or 3"),
        ({}, "zero_optimization.stage=None is not 1, 2 or 3"),
    ],
)
def test_file_that_contradicts_our_config_is_refused(config, tmp_path, values, message):
    complete = {"zero_optimization": {"stage": 2}, **values} if values else {}
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(with_file(config, tmp_path / "ds.json", complete), TWO_CPU_RANKS)


def test_file_decides_the_stage_and_agreeing_numbers_stay(config, tmp_path):
    values = {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 2, "steps_per_print": 50}
    settings = deepspeed_config(with_file(config, tmp_path / "ds.json", values), TWO_CPU_RANKS)
    assert settings["zero_optimization"]["stage"] == 1
    assert settings["steps_per_print"] == 50
