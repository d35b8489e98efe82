"""Every key of the section `rlhf` does what its description says. Lengths, pairs and reward keys: their own files."""

import copy

import pytest
import torch
from alignment_cases import ALONE

from ultrathink_model.alignment.align import make_algorithm
from ultrathink_model.alignment.learner import Learner
from ultrathink_model.alignment.pairs import make_pairs
from ultrathink_model.alignment.policy_run import Players, PolicyRun
from ultrathink_model.alignment.reward_training import RewardTrainer
from ultrathink_model.alignment.rewards import make_rewards
from ultrathink_model.config import make_config, override_config
from ultrathink_model.data import Tokenizer, ValidationLoader
from ultrathink_model.errors import ConfigError
from ultrathink_model.evaluation.perplexity import validation_loss
from ultrathink_model.models.hf import load_model


@pytest.fixture(scope="module")
def players(base_config, manifest, dense_folder) -> Players:
    model = load_model(dense_folder).eval()
    pairs = make_pairs(base_config, manifest, Tokenizer.load(manifest.tokenizer_folder), model, ALONE)
    reward_model = RewardTrainer(base_config, model, manifest.pad_id, ALONE).fit(pairs, lambda *_: None)
    rewards = make_rewards(base_config.rlhf, reward_model, Tokenizer.load(manifest.tokenizer_folder), ALONE.device)
    return Players(model.requires_grad_(False), rewards, pairs)


@pytest.fixture
def start(base_config, manifest, players):
    """A run at its first round, under overrides of `rlhf`."""

    def start(*keys: str) -> PolicyRun:
        config = override_config(base_config, [f"rlhf.{key}" for key in ("ptx_weight=0", *keys)])
        algorithm, head = make_algorithm(config, ALONE, players, manifest)
        policy = copy.deepcopy(players.reference).requires_grad_(True)
        rates = config.rlhf.policy_learning_rate, config.rlhf.value_learning_rate
        return PolicyRun(config, ALONE, manifest, Learner(config, ALONE, policy, head, *rates), algorithm, players, 0)

    return start


def play(run: PolicyRun, rounds: int = 1):
    for _ in range(rounds):
        rollout, measure = run.draw()
        update = run.learn(rollout, measure)
    return rollout, measure, update


def kl_after_a_round(run: PolicyRun) -> float:
    play(run)
    return run.draw()[1].kl


def experience(run: PolicyRun):
    """The first round's advantages, with values that are not all zero."""
    with torch.no_grad():
        run.learner.head.outer.weight.fill_(0.3)
    rollout, _ = run.draw()
    return rollout, run._algorithm.prepare(rollout, run.control.weight, 0)


@pytest.mark.parametrize(
    ("keys", "responses"), [((), 16), (("ppo_batch_size=8",), 8), (("rlhf_steps_per_iteration=3",), 48)]
)
def test_batches_make_a_round(start, keys, responses):
    rollout, measure = start(*keys).draw()
    assert len(rollout.sequences) == measure.responses == responses


@pytest.mark.parametrize(("keys", "steps"), [((), 4), (("ppo_epochs=3",), 6), (("ppo_minibatch_size=16",), 2)])
def test_epochs_and_minibatches_make_the_steps_of_a_round(start, keys, steps):
    assert play(start(*keys))[2].steps == steps


def test_rounds_end_after_rlhf_iterations(start):
    run = start("rlhf_iterations=2")
    play(run)
    assert not run.is_done
    play(run)
    assert run.is_done


def test_policy_learning_rate_decides_how_far_a_round_goes(start):
    near, far = (kl_after_a_round(start(f"policy_learning_rate={rate}")) for rate in (1e-4, 1e-3))
    assert far > 5 * near > 0


def test_value_learning_rate_moves_the_value_head(start):
    slow, fast = (start(f"value_learning_rate={rate}") for rate in (1e-4, 1e-2))
    for run in (slow, fast):
        play(run)
    assert fast.learner.head.outer.weight.norm() > 10 * slow.learner.head.outer.weight.norm()


def test_clip_range_decides_which_ratios_are_cut(start):
    narrow, wide = (
        play(start(f"clip_range={r}", "policy_learning_rate=3e-3", "ppo_epochs=4"))[2].means["clip_fraction"]
        for r in (0.01, 0.9)
    )
    assert narrow > 0.3
    assert narrow > wide + 0.15


def test_value_clip_range_holds_values_near_their_old_ones(start):
    tight, loose = (start(f"value_clip_range={r}") for r in (1e-3, 10.0))
    losses = []
    for run in (tight, loose):
        rollout, _ = run.draw()
        rows = run._algorithm.prepare(rollout, 0.0, 0)
        with torch.no_grad():
            run.learner.head.outer.bias.copy_(rows.returns.mean())  # every value moves nearer to its return
        losses.append(float(run._algorithm.terms(run.learner, rows).sums["value_loss"]))
    assert losses[0] > losses[1]


def test_value_weight_zero_leaves_the_value_head_alone(start):
    run = start("value_weight=0")
    play(run)
    assert run.learner.head.outer.weight.abs().max() == 0


def test_entropy_weight_keeps_the_policy_undecided(start):
    plain, bonus = (start(f"entropy_weight={weight}") for weight in (0.0, 1.0))
    for run in (plain, bonus):
        play(run, 2)
    assert bonus.draw()[1].entropy > plain.draw()[1].entropy + 0.02


def test_gamma_discounts_the_last_tokens_score(start):
    _, whole = experience(start("whiten_advantages=false", "gae_lambda=1"))
    rollout, half = experience(start("whiten_advantages=false", "gae_lambda=1", "gamma=0.5"))
    scores = rollout.scores
    rewards_first = whole.returns[:, 0]  # the KL is zero in the first round, so only the score is paid
    full_length = rollout.sequences.response_mask.all(1)
    torch.testing.assert_close(rewards_first, scores)
    torch.testing.assert_close(half.returns[full_length, 0], scores[full_length] * 0.5**4)


def test_gae_lambda_decides_between_one_step_and_the_whole_response(start):
    one_step, whole = (experience(start("whiten_advantages=false", f"gae_lambda={x}"))[1] for x in (0, 1))
    values = one_step.old_values
    torch.testing.assert_close(one_step.advantages[:, 0], values[:, 1] - values[:, 0])
    torch.testing.assert_close(whole.returns[:, 0], whole.returns[:, 1])


def test_whitened_advantages_have_unit_variance(start):
    rollout, white = experience(start())
    _, raw = experience(start("whiten_advantages=false"))
    mask = rollout.sequences.response_mask
    assert white.advantages[mask].std().item() == pytest.approx(1, abs=1e-3)
    assert raw.advantages[mask].std().item() != pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_kl_weight_holds_the_policy_near_its_reference(start, algorithm):
    free, held = (
        start(f"algorithm={algorithm}", f"kl_weight={weight}", "adaptive_kl=false", "target_kl=1000", "ppo_epochs=4")
        for weight in (0.0, 10.0)
    )
    for run in (free, held):
        play(run, 3)
    assert held.draw()[1].kl < 0.7 * free.draw()[1].kl


def test_adaptive_kl_and_horizon_move_the_weight(start):
    moved, slower, fixed = (
        start("kl_weight=0.1", *keys) for keys in (("kl_horizon=16",), ("kl_horizon=160",), ("adaptive_kl=false",))
    )
    for run in (moved, slower, fixed):
        play(run)  # the KL of the first round is 0: as far under the aim as can be
    assert moved.control.weight == pytest.approx(0.1 * 0.8)
    assert slower.control.weight == pytest.approx(0.1 * 0.98)
    assert fixed.control.weight == 0.1


def test_target_kl_stops_a_rounds_updates(start):
    run = start("target_kl=0.01", "policy_learning_rate=3e-3", "ppo_epochs=4")
    update = play(run)[2]
    assert update.stopped_early
    assert 1 <= update.steps < 8


def test_temperature_sharpens_what_is_drawn_and_learnt_from(start):
    hot, cold = (start(f"temperature={t}").draw() for t in (1.0, 0.3))
    assert cold[1].entropy < hot[1].entropy - 0.2
    assert cold[0].logprobs.mean() > hot[0].logprobs.mean()


def test_top_p_leaves_out_unlikely_tokens(start):
    rollout, _ = start("top_p=0.01").draw()
    # Only the most likely token is left, and its probability is that of the untruncated distribution.
    assert rollout.logprobs.max() < 0
    prompts = rollout.sequences.tokens[:, : rollout.sequences.prompt_length]
    again = start("top_p=0.01", "rlhf_iterations=9").draw()[0]
    assert torch.equal(again.sequences.tokens[:, : prompts.shape[1]], prompts)
    free = start().draw()[0]
    assert rollout.logprobs.mean() > free.logprobs.mean()


def test_prompt_and_response_tokens_shape_the_rollouts(start, base_config):
    rollout, measure = start().draw()
    assert rollout.sequences.prompt_length == base_config.rlhf.prompt_tokens
    assert measure.response_tokens <= base_config.rlhf.response_tokens
    assert start("response_tokens=3").draw()[1].response_tokens <= 3


def test_group_size_draws_that_often_to_each_prompt(start):
    rollout, _ = start("algorithm=grpo", "group_size=8").draw()
    prompts = rollout.sequences.tokens[:, : rollout.sequences.prompt_length].view(2, 8, -1)
    assert (prompts == prompts[:, :1]).all()
    assert not torch.equal(prompts[0], prompts[1])


def test_dpo_beta_scales_the_margin(start):
    weak, strong = (start("algorithm=dpo", f"dpo_beta={beta}") for beta in (0.01, 1.0))
    margins = [play(run, 2)[2].means["margin"] for run in (weak, strong)]
    assert margins[1] > 10 * abs(margins[0])


def language_model_loss(run: PolicyRun, manifest) -> float:
    loader = ValidationLoader(manifest, run.config, max_sequences=40)
    forward = run.learner.forward
    return validation_loss(
        lambda batch: forward(batch.input_ids, labels=batch.labels, document_ids=batch.document_ids),
        loader,
        "cpu",
        lambda tensor: tensor,
    ).loss


def test_ptx_update_keeps_the_language_model(start, manifest):
    # Without a score to learn from (all advantages white noise) the policy drifts; text holds it.
    keys = ("rlhf_frequency=1", "policy_learning_rate=3e-3", "target_kl=1000")
    without, with_text = start(*keys, "ptx_weight=0"), start(*keys, "ptx_weight=20")
    for run in (without, with_text):
        play(run, 4)
    assert language_model_loss(with_text, manifest) < language_model_loss(without, manifest)
    assert with_text.position.tokens > without.position.tokens


def test_rlhf_frequency_decides_the_rounds_with_a_ptx_update(start):
    tokens = []
    for keys in (("ptx_weight=0",), ("ptx_weight=1", "rlhf_frequency=2"), ("ptx_weight=1", "rlhf_frequency=3")):
        run = start(*keys)
        drawn = []
        for _ in range(4):
            before = run.position.tokens
            measure = play(run)[1]
            drawn.append(run.position.tokens - before - round(measure.response_tokens * measure.responses))
        tokens.append([count > 0 for count in drawn])
    assert tokens == [[False] * 4, [False, True, False, True], [False, False, True, False]]


def test_adaptive_control_of_no_weight_is_refused():
    with pytest.raises(ConfigError, match=r"rlhf\.adaptive_kl"):
        make_config({"rlhf": {"kl_weight": 0}})
