import os
import signal
from pathlib import Path

import pytest
import torch

from ultrathink_model.alignment.align import align
from ultrathink_model.alignment.reward import load_reward_model
from ultrathink_model.alignment.reward_stage import learn_rewards
from ultrathink_model.alignment.reward_training import RewardTrainer
from ultrathink_model.config import override_config
from ultrathink_model.errors import CheckpointError, ConfigError, TrainingStoppedError
from ultrathink_model.stage import run_stage
from ultrathink_model.tracking.metrics import read_metrics

REWARD_FILES = ("model.safetensors", "reward_head.safetensors", "reward.json")


@pytest.fixture
def alone(config, tmp_path):
    return override_config(config, ["rlhf.only_reward_model=true", f"output.output_dir={tmp_path / 'reward'}"])


def rows(folder):
    return [
        {key: value for key, value in row.items() if key != "time"} for row in read_metrics(folder / "metrics.jsonl")
    ]


def test_stage_leaves_a_reward_model_that_rlhf_takes(config, alone, manifest, dense_folder, monkeypatch):
    result = run_stage(alone, manifest=manifest, run_name="reward", init_from=dense_folder)
    folder, record = Path(result.output_dir), load_reward_model(Path(result.final_model)).record
    assert result.metrics["rlhf/reward_accuracy"] == record.accuracy
    assert result.tokens > 0
    losses = [row["rlhf/reward_train_loss"] for row in rows(folder) if "rlhf/reward_train_loss" in row]
    assert len(losses) == result.steps
    assert min(losses) < losses[0]  # each is of other pairs, so the last may be a hard one

    def never(*_):
        raise AssertionError("a reward model was trained again")

    monkeypatch.setattr(RewardTrainer, "fit", never)
    taking = override_config(config, [f"rlhf.reward_run={folder}", "rlhf.rlhf_iterations=1"])
    aligned = Path(align(taking, manifest=manifest, run_name="rlhf", init_from=dense_folder).output_dir)
    assert (aligned / "pairs.jsonl").read_bytes() == (folder / "pairs.jsonl").read_bytes()
    for name in REWARD_FILES:
        assert (aligned / "reward_model" / name).read_bytes() == (folder / "final_model" / name).read_bytes()
    assert rows(aligned)[0]["rlhf/reward_accuracy"] == record.accuracy


def test_stopped_stage_goes_on_to_the_same_reward_model(alone, manifest, dense_folder, tmp_path, monkeypatch):
    whole = override_config(alone, [f"output.output_dir={tmp_path / 'whole'}"])
    expected = learn_rewards(whole, manifest=manifest, run_name="r", init_from=dense_folder)
    step, calls = RewardTrainer._step, []

    def signalled(self: RewardTrainer, *arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(RewardTrainer, "_step", signalled)
    with pytest.raises(TrainingStoppedError, match="after step 3 of 6 of its reward model, and saved"):
        learn_rewards(alone, manifest=manifest, run_name="r", init_from=dense_folder)
    result = learn_rewards(alone, manifest=manifest, run_name="r", init_from=dense_folder)
    assert len(calls) == 6
    assert rows(Path(result.output_dir)) == rows(Path(expected.output_dir))
    models = [load_reward_model(Path(done.final_model)) for done in (result, expected)]
    assert torch.equal(models[0].head.weight, models[1].head.weight)


def test_checkpoints_are_as_frequent_as_the_config_says(alone, manifest, dense_folder):
    often = override_config(alone, ["training.checkpoint_steps=2", "training.keep_checkpoints=9"])
    result = learn_rewards(often, manifest=manifest, run_name="r", init_from=dense_folder)
    assert sorted(path.name for path in Path(result.output_dir).glob("checkpoint_*")) == [
        f"checkpoint_{step:08d}.pt" for step in (2, 4, 6)
    ]


def test_run_without_a_reward_model_is_refused(config, manifest, dense_folder, tmp_path):
    taking = override_config(config, [f"rlhf.reward_run={tmp_path}"])
    with pytest.raises(CheckpointError, match=r"holds no finished reward model .* rlhf\.only_reward_model=true"):
        align(taking, manifest=manifest, run_name="rlhf", init_from=dense_folder)
    assert not Path(config.output.output_dir).exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rlhf.only_reward_model=true", "rlhf.reward_run=x"], "set one of them"),
        (
            ["rlhf.only_reward_model=true", "rlhf.rewards=[{name: a, kind: callable, source: 'm:f'}]"],
            "names no reward of kind preferences",
        ),
    ],
)
def test_contradictions_are_refused(config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        override_config(config, overrides)
