"""Two real ranks over gloo against one process."""

from pathlib import Path

import pytest
import torch

from ultrathink_model.alignment.align import align
from ultrathink_model.alignment.reward import load_reward_model
from ultrathink_model.alignment.reward_stage import learn_rewards
from ultrathink_model.alignment.starting_model import check_alignment
from ultrathink_model.config import override_config
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.distributed.launch import launch
from ultrathink_model.errors import ConfigError
from ultrathink_model.models.hf import load_model
from ultrathink_model.tracking.metrics import read_metrics

TWO_RANKS = ["distributed.enabled=true", "distributed.num_processes=2"]


def align_on_rank(config, manifest, init_from):
    return align(config, manifest=manifest, run_name="r", init_from=init_from)


STRATEGIES = {
    "ddp": [],
    "fsdp": ["distributed.strategy=fsdp"],
    "zero2": ["distributed.strategy=deepspeed", "distributed.zero_stage=2"],
    "zero3": ["distributed.strategy=deepspeed", "distributed.zero_stage=3"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "strategy"),
    [("ppo", "ddp"), ("grpo", "ddp"), ("dpo", "ddp"), ("ppo", "fsdp"), ("grpo", "fsdp"), ("ppo", "zero2")],
)
def test_stage_runs_on_two_ranks(config, manifest, routed_folder, algorithm, strategy):
    config = override_config(config, [*TWO_RANKS, *STRATEGIES[strategy], f"rlhf.algorithm={algorithm}"])
    result = launch(align_on_rank, (config, manifest, routed_folder), config)
    rows = read_metrics(Path(result.output_dir) / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0]["rlhf/kl"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["rlhf/update_steps"] > 0


@pytest.mark.slow
def test_value_head_learns_the_same_under_zero_as_under_ddp(config, manifest, dense_folder, tmp_path):
    losses = []
    for strategy in ("ddp", "zero2"):
        over = [*TWO_RANKS, *STRATEGIES[strategy], "rlhf.algorithm=ppo", f"output.output_dir={tmp_path / strategy}"]
        two_config = override_config(config, over)
        result = launch(align_on_rank, (two_config, manifest, dense_folder), two_config)
        losses.append([row["rlhf/value_loss"] for row in read_metrics(Path(result.output_dir) / "metrics.jsonl")[:2]])
    # A head whose gradient is scaled by the ranks, and so clipped more, makes half as much again in the second round.
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "zero2", "zero3"))]
)
def test_reward_model_and_dpo_learn_the_same_from_two_ranks_as_from_one(
    config, manifest, dense_folder, tmp_path, strategy
):
    # No rollout is learnt from under DPO, and one minibatch holds the round, so that both runs see the same pairs.
    config = override_config(config, ["rlhf.algorithm=dpo", "rlhf.ppo_minibatch_size=16", "rlhf.rlhf_iterations=2"])
    one = align_on_rank(config, manifest, dense_folder)
    # Half the sequences on each rank: the language-model updates see the same batch, too.
    half = ["training.batch_size=2", f"output.output_dir={tmp_path / 'two'}"]
    two_config = override_config(config, [*TWO_RANKS, *STRATEGIES[strategy], *half])
    two = launch(align_on_rank, (two_config, manifest, dense_folder), two_config)
    one_rows, two_rows = (read_metrics(Path(result.output_dir) / "metrics.jsonl") for result in (one, two))
    # Sums in another order: rounding, which AdamW's first steps make larger.
    for name in ("rlhf/policy_loss", "rlhf/margin"):
        assert two_rows[0][name] == pytest.approx(one_rows[0][name], rel=1e-3, abs=1e-4), name
    # Rounding makes it 4e-9; a head whose gradient is scaled by the ranks, and so clipped more, 4e-5 at least.
    assert two_rows[0]["rlhf/reward_loss"] == pytest.approx(one_rows[0]["rlhf/reward_loss"], rel=1e-5)
    assert two_rows[1]["rlhf/policy_loss"] == pytest.approx(one_rows[1]["rlhf/policy_loss"], rel=1e-3)
    expected = load_model(Path(one.final_model)).state_dict()
    for name, tensor in load_model(Path(two.final_model)).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-4, rtol=0, msg=name)


def learn_rewards_on_rank(config, manifest, init_from):
    return learn_rewards(config, manifest=manifest, run_name="reward", init_from=init_from)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_reward_stage_learns_the_same_from_two_ranks_as_from_one(config, manifest, dense_folder, tmp_path, strategy):
    config = override_config(config, ["rlhf.only_reward_model=true", "training.checkpoint_steps=3"])
    one = learn_rewards_on_rank(config, manifest, dense_folder)
    over = [*TWO_RANKS, *STRATEGIES[strategy], f"output.output_dir={tmp_path / 'two'}"]
    two_config = override_config(config, over)
    two = launch(learn_rewards_on_rank, (two_config, manifest, dense_folder), two_config)
    assert (two.steps, two.tokens) == (one.steps, one.tokens)
    models = [load_reward_model(Path(done.final_model)) for done in (one, two)]
    # Rounding moves the head by 1e-8; clipping a gradient that is scaled by the ranks moves it by 4e-4.
    torch.testing.assert_close(models[0].head.weight, models[1].head.weight, atol=1e-5, rtol=0)
    assert models[0].record.loss == pytest.approx(models[1].record.loss, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rlhf.ppo_minibatch_size=1"], r"rlhf\.ppo_minibatch_size=1 does not divide over 2 ranks"),
        (["advanced.enable_dre=true", *STRATEGIES["zero3"]], r"enable_dre=true and ZeRO 3 do not go together"),
        (["rlhf.algorithm=grpo", "rlhf.group_size=16"], r"rlhf\.ppo_batch_size=16 in groups of 16 does not divide"),
    ],
)
def test_what_ranks_cannot_share_is_refused(config, manifest, dense_folder, overrides, message):
    config = override_config(config, [*TWO_RANKS, *overrides])
    with pytest.raises(ConfigError, match=message):
        check_alignment(config, manifest, dense_folder, RankContext(0, 0, 2, torch.device("cpu")))
