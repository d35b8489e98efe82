import json
import os
import signal
from pathlib import Path

import pytest
import torch

from ultrathink_model.alignment.align import align
from ultrathink_model.alignment.policy_run import PolicyRun
from ultrathink_model.alignment.reward import load_reward_model
from ultrathink_model.alignment.reward_training import RewardTrainer
from ultrathink_model.config import load_config, override_config
from ultrathink_model.errors import ConfigError, TokenizerError, TrainingStoppedError
from ultrathink_model.models.hf import load_model, save_model
from ultrathink_model.tracking.metrics import read_metrics
from ultrathink_model.tracking.run_folder import RunFolder

EACH_ROUND = {"rlhf/reward", "rlhf/kl", "rlhf/entropy", "rlhf/response_tokens", "tokens"}
EACH_UPDATE = {"rlhf/policy_loss", "rlhf/update_steps"}


def rows_without_time(folder: str | Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(Path(folder) / "metrics.jsonl")]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_model(Path(folder) / "final_model").state_dict()


@pytest.mark.parametrize(
    ("algorithm", "own"),
    [
        ("ppo", {"rlhf/value_loss", "rlhf/clip_fraction", "rlhf/kl_weight"}),
        ("grpo", {"rlhf/clip_fraction", "rlhf/kl_weight"}),
        ("dpo", {"rlhf/margin"}),
    ],
)
def test_stage_leaves_the_run_folder_of_the_contract(config, manifest, routed_folder, algorithm, own):
    config = override_config(config, [f"rlhf.algorithm={algorithm}"])
    result = align(config, manifest=manifest, run_name="aligned", init_from=routed_folder)
    folder = Path(result.output_dir)
    lines = rows_without_time(folder)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert all(line.keys() >= EACH_ROUND for line in lines)
    assert all(line.keys() >= EACH_UPDATE | own for line in lines[:-1])
    assert 0 <= lines[0]["rlhf/reward_accuracy"] <= 1
    assert lines[0]["rlhf/kl"] == pytest.approx(0, abs=1e-5)
    assert lines[-1].keys() >= {"val/loss", "rlhf/heldout_reward", "rlhf/heldout_reward_before"}
    assert result.steps == 4
    assert result.metrics["val/loss"] == lines[-1]["val/loss"]
    samples = json.loads((folder / "samples.json").read_text())
    assert [sorted(sample) for sample in samples] == [
        ["after", "before", "prompt", "reward_after", "reward_before"]
    ] * 2
    assert RunFolder(folder).record().status == "finished"
    assert load_reward_model(folder / "reward_model").record.accuracy == lines[0]["rlhf/reward_accuracy"]
    assert load_config(folder / "config.yaml").advanced.enable_moe  # the architecture of the model that was aligned
    moved = [
        name
        for name, tensor in weights(folder).items()
        if not torch.equal(tensor, load_model(routed_folder).state_dict()[name])
    ]
    assert moved


def test_reward_rises_while_the_kl_stays_under_its_bound(config, manifest, dense_folder):
    overrides = ["rlhf.num_pairs=80", "rlhf.reward_epochs=6", "rlhf.rlhf_iterations=12", "rlhf.ppo_batch_size=64"]
    overrides += [
        "rlhf.ppo_minibatch_size=32",
        "rlhf.target_kl=3",
        "rlhf.policy_learning_rate=3e-3",
        "rlhf.kl_weight=0.02",
    ]
    result = align(override_config(config, overrides), manifest=manifest, run_name="r", init_from=dense_folder)
    lines = rows_without_time(result.output_dir)
    assert result.metrics["rlhf/kl"] <= 3
    # In standard deviations of the scores; a round's mean over 64 responses has a standard error of an eighth of one.
    assert lines[-1]["rlhf/reward"] > lines[0]["rlhf/reward"] + 0.5
    assert result.metrics["rlhf/heldout_reward"] > result.metrics["rlhf/heldout_reward_before"] + 0.2


def test_a_policy_beyond_the_bound_gives_way_to_the_last_one_under_it(config, manifest, dense_folder, caplog):
    overrides = ["rlhf.target_kl=0.02", "rlhf.policy_learning_rate=1e-2", "rlhf.kl_weight=0", "rlhf.adaptive_kl=false"]
    result = align(override_config(config, overrides), manifest=manifest, run_name="r", init_from=dense_folder)
    lines = rows_without_time(result.output_dir)
    assert lines[1]["rlhf/kl"] > 0.02
    assert result.metrics["rlhf/kl"] <= 0.02
    assert result.metrics["rlhf/accepted_round"] == 0
    assert "the policy of 0 rounds is kept" in caplog.text
    start = load_model(dense_folder).state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(result.output_dir).items())


def test_dpo_ends_where_it_passes_the_bound(config, manifest, dense_folder, caplog):
    overrides = ["rlhf.algorithm=dpo", "rlhf.target_kl=0.02", "rlhf.policy_learning_rate=1e-2"]
    result = align(override_config(config, overrides), manifest=manifest, run_name="r", init_from=dense_folder)
    assert result.steps == 1
    assert result.metrics["rlhf/kl"] <= 0.02
    assert "no way back" in caplog.text


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "dpo"])
def test_a_stopped_run_goes_on_bitwise_as_if_it_had_not_been_stopped(
    config, manifest, routed_folder, tmp_path, monkeypatch, algorithm
):
    config = override_config(config, [f"rlhf.algorithm={algorithm}", "moe.router_jitter=0.1"])
    whole = override_config(config, [f"output.output_dir={tmp_path / 'whole'}"])
    whole_result = align(whole, manifest=manifest, run_name="r", init_from=routed_folder)
    update = PolicyRun.learn

    def signalled_in_round_two(self: PolicyRun, *args):
        if self.position.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PolicyRun, "learn", signalled_in_round_two)
        with pytest.raises(TrainingStoppedError, match=r"SIGTERM after round 3 of 4, and saved") as stopped:
            align(config, manifest=manifest, run_name="r", init_from=routed_folder)
    assert stopped.value.exit_code == 75
    folder = RunFolder(config.output.output_dir)
    assert folder.record().status == "stopped"
    assert [step for step, _ in folder.checkpoints()] == [2, 3]
    pairs, reward_time = (
        (folder.path / "pairs.jsonl").stat().st_mtime_ns,
        (folder.path / "reward_model").stat().st_mtime_ns,
    )
    result = align(config, manifest=manifest, run_name="r", init_from=routed_folder)
    assert (folder.path / "pairs.jsonl").stat().st_mtime_ns == pairs
    assert (folder.path / "reward_model").stat().st_mtime_ns == reward_time
    assert rows_without_time(folder.path) == rows_without_time(tmp_path / "whole")
    assert result.metrics == whole_result.metrics
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder.path).items())


def test_a_killed_run_goes_on_from_its_last_checkpoint(config, manifest, dense_folder, tmp_path, monkeypatch):
    whole = override_config(config, [f"output.output_dir={tmp_path / 'whole'}"])
    align(whole, manifest=manifest, run_name="r", init_from=dense_folder)
    update = PolicyRun.learn

    def dies_in_round_three(self: PolicyRun, *args):
        if self.position.step == 3:
            raise KeyboardInterrupt
        return update(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PolicyRun, "learn", dies_in_round_three)
        with pytest.raises(KeyboardInterrupt):
            align(config, manifest=manifest, run_name="r", init_from=dense_folder)
    # The line of round 2 is there, and its update is in no checkpoint.
    assert [step for step, _ in RunFolder(config.output.output_dir).checkpoints()] == [2]
    align(config, manifest=manifest, run_name="r", init_from=dense_folder)
    assert rows_without_time(config.output.output_dir) == rows_without_time(tmp_path / "whole")


def test_a_signal_while_the_reward_model_is_trained_keeps_the_pairs(config, manifest, dense_folder, monkeypatch):
    step = RewardTrainer._step

    def signalled(self: RewardTrainer, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(RewardTrainer, "_step", signalled)
    with pytest.raises(TrainingStoppedError, match="its pairs are saved"):
        align(config, manifest=manifest, run_name="r", init_from=dense_folder)
    folder = Path(config.output.output_dir)
    assert (folder / "pairs.jsonl").is_file()
    assert not (folder / "reward_model").exists()


def test_a_finished_run_is_not_run_again(config, manifest, dense_folder):
    first = align(config, manifest=manifest, run_name="r", init_from=dense_folder)
    before = (Path(first.output_dir) / "metrics.jsonl").read_bytes()
    assert align(config, manifest=manifest, run_name="r", init_from=dense_folder) == first
    assert (Path(first.output_dir) / "metrics.jsonl").read_bytes() == before


def test_another_run_in_the_same_folder_makes_its_own_pairs_and_reward_model(config, manifest, dense_folder):
    align(config, manifest=manifest, run_name="one", init_from=dense_folder)
    folder = Path(config.output.output_dir)
    first = (folder / "pairs.jsonl").read_bytes()
    align(override_config(config, ["training.seed=7"]), manifest=manifest, run_name="two", init_from=dense_folder)
    assert (folder / "pairs.jsonl").read_bytes() != first
    assert len(rows_without_time(folder)) == 5


def test_a_feature_that_the_model_lacks_is_grafted_on(config, manifest, dense_folder):
    config = override_config(config, ["advanced.enable_dre=true", "rlhf.rlhf_iterations=2"])
    result = align(config, manifest=manifest, run_name="r", init_from=dense_folder)
    assert load_model(Path(result.final_model)).config.advanced.enable_dre


# RMSNorm on bf16 with float32 weights is what autocast makes of the model; there is no fused kernel for it.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_mixed_precision_is_taken(config, manifest, routed_folder):
    config = override_config(config, ["training.use_amp=true", "rlhf.rlhf_iterations=2"])
    lines = rows_without_time(align(config, manifest=manifest, run_name="r", init_from=routed_folder).output_dir)
    assert lines[0]["rlhf/kl"] == 0  # policy and reference round alike
    assert lines[0]["rlhf/update_steps"] > 0


def test_an_output_projection_of_its_own_is_taken(base_config, manifest, config, tmp_path):
    from alignment_cases import trained

    untied = override_config(base_config, ["model.tie_embeddings=false"])
    save_model(trained(untied, manifest, 20), manifest.tokenizer_folder, tmp_path / "untied")
    result = align(config, manifest=manifest, run_name="r", init_from=tmp_path / "untied")
    assert not load_model(Path(result.final_model)).config.model.tie_embeddings


def test_alignment_needs_a_model(config, manifest):
    with pytest.raises(ConfigError, match="add --init-from"):
        align(config, manifest=manifest, run_name="r", init_from=None)


def test_data_of_another_tokenizer_is_refused(config, manifest, dense_folder):
    other = manifest.model_copy(update={"tokenizer_hash": "another"})
    with pytest.raises(TokenizerError, match=r"data\.tokenizer_name"):
        align(config, manifest=other, run_name="r", init_from=dense_folder)


def test_fp16_is_refused(config, manifest, dense_folder):
    half = override_config(config, ["training.use_amp=true", "training.amp_dtype=fp16"])
    with pytest.raises(ConfigError, match="take bf16"):
        align(half, manifest=manifest, run_name="r", init_from=dense_folder)
