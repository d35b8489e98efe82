import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ultrathink_model.alignment.objectives import (
    calibration_error,
    clipped_policy_loss,
    clipped_value_loss,
    exact_kl_and_entropy,
    generalized_advantages,
    group_advantages,
    kl_estimate,
    preference_loss,
    whiten,
)
from ultrathink_model.alignment.sequences import token_entropies, token_logprobs

FULL = torch.ones(2, 4, dtype=torch.bool)


def alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_advantages_with_lambda_one_are_discounted_returns_less_the_value():
    rewards, values, gamma = draws(2, 4), draws(2, 4, seed=1), 0.9
    advantages, returns = generalized_advantages(rewards, values, FULL, gamma, 1.0)
    discounted = torch.stack(
        [sum(gamma ** (later - now) * rewards[:, later] for later in range(now, 4)) for now in range(4)], 1
    )
    torch.testing.assert_close(advantages, discounted - values)
    torch.testing.assert_close(returns, discounted)


def test_advantages_with_lambda_zero_are_one_step_errors():
    rewards, values, gamma = draws(2, 4), draws(2, 4, seed=1), 0.9
    advantages, _ = generalized_advantages(rewards, values, FULL, gamma, 0.0)
    following = torch.cat([values[:, 1:], torch.zeros(2, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(advantages, rewards + gamma * following - values)


@given(st.floats(0.5, 1), st.floats(0, 1), st.integers(1, 4))
def test_advantages_are_the_weighted_sum_of_one_step_errors_of_the_tokens_that_count(gamma, gae_lambda, length):
    rewards, values = draws(1, 4), draws(1, 4, seed=1)
    mask = torch.arange(4)[None] < length
    advantages, _ = generalized_advantages(rewards, values, mask, gamma, gae_lambda)
    later = torch.cat([values[0, 1:length], torch.zeros(1, dtype=torch.float64)])
    errors = rewards[0, :length] + gamma * later - values[0, :length]
    expected = [
        sum((gamma * gae_lambda) ** (k - t) * float(errors[k]) for k in range(t, length)) if t < length else 0.0
        for t in range(4)
    ]
    torch.testing.assert_close(advantages[0], torch.tensor(expected, dtype=torch.float64))


def test_kl_estimate_and_exact_kl_agree_in_the_mean():
    policy, reference = draws(1, 1, 7), draws(1, 1, 7, seed=1)
    probabilities = policy.softmax(-1).flatten()
    # The mean over what the policy draws, taken exactly: every token weighted by its probability.
    tokens = torch.arange(7)[:, None]
    logprobs, reference_logprobs = (
        token_logprobs(logits.expand(7, 1, 7), tokens).flatten() for logits in (policy, reference)
    )
    estimate = (probabilities * kl_estimate(logprobs[:, None], reference_logprobs[:, None]).flatten()).sum()
    closed_form = (probabilities * (logprobs - reference_logprobs)).sum()
    torch.testing.assert_close(estimate, closed_form)
    kl, entropy = exact_kl_and_entropy(policy.log_softmax(-1), reference.log_softmax(-1))
    torch.testing.assert_close(kl.squeeze(), closed_form)
    torch.testing.assert_close(entropy, token_entropies(policy))


def test_kl_of_a_policy_to_itself_is_zero():
    logprobs = draws(2, 3, 5).log_softmax(-1)
    assert exact_kl_and_entropy(logprobs, logprobs)[0].abs().max() == 0
    assert kl_estimate(draws(2, 3), draws(2, 3)).abs().max() == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "is_clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 1.0, -1.2, True),
        (1.5, -1.0, 1.5, False),
        (0.5, 1.0, -0.5, False),
        (0.5, -1.0, 0.8, True),
    ],
)
def test_policy_loss_is_clipped_where_the_ratio_has_already_gone_the_way_of_the_advantage(
    ratio, advantage, loss, is_clipped
):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    result, clipped = clipped_policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), 0.2)
    assert result.item() == pytest.approx(loss)
    assert bool(clipped) is is_clipped
    result.sum().backward()
    assert (logprobs.grad.item() == 0) is is_clipped


def test_policy_gradient_before_the_first_step_is_that_of_the_plain_surrogate():
    logprobs, advantages = draws(2, 4).requires_grad_(), draws(2, 4, seed=1)
    clipped_policy_loss(logprobs, logprobs.detach(), advantages, 0.2)[0].sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)


@pytest.mark.parametrize(
    ("value", "target", "loss"),
    # old value 0, range 0.2: half the greater of the value's own error and that of the value held within the range
    [(0.1, 1.0, 0.5 * 0.9**2), (0.5, 1.0, 0.5 * 0.8**2), (0.5, -1.0, 0.5 * 1.5**2), (-0.5, 1.0, 0.5 * 1.5**2)],
)
def test_value_loss_is_the_greater_of_free_and_held_error(value, target, loss):
    result = clipped_value_loss(torch.tensor([[value]]), torch.zeros(1, 1), torch.tensor([[target]]), 0.2)
    assert result.item() == pytest.approx(loss)


def test_whitened_values_have_zero_mean_and_unit_variance_over_the_mask():
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    white = whiten(draws(2, 4) * 7 + 3, mask, alone)
    assert white[mask].mean().abs() < 1e-12
    assert white[mask].var().item() == pytest.approx(1)
    assert white[~mask].abs().max() == 0


def test_whitening_over_two_ranks_equals_whitening_of_all_rows_at_once():
    values, mask = draws(2, 4), torch.arange(4)[None] < torch.tensor([[4], [2]])
    whole = whiten(values, mask, alone)
    parts = [torch.stack([part.sum().to(values.dtype), (values[i] * part).sum()]) for i, part in enumerate(mask)]
    mean = (parts[0][1] + parts[1][1]) / mask.sum()
    squares = ((values - mean) * mask).square().sum()
    sums = iter([parts[0] + parts[1], squares])
    torch.testing.assert_close(whiten(values[:1], mask[:1], lambda _: next(sums)), whole[:1])


def test_whitening_equal_values_gives_zeros_and_not_noise():
    assert whiten(torch.full((2, 4), 0.1), FULL, alone).abs().max() < 1e-3


def test_group_advantages_compare_with_the_prompts_own_group():
    scores = torch.tensor([1.0, 3.0, 10.0, 10.0])
    assert group_advantages(scores, 2, scale=False).tolist() == [-1, 1, 0, 0]
    scaled = group_advantages(scores, 2, scale=True)
    torch.testing.assert_close(scaled, torch.tensor([-(0.5**0.5), 0.5**0.5, 0, 0]), atol=1e-3, rtol=0)


def test_margin_asks_for_a_wider_gap():
    chosen, rejected = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0])
    margin = torch.tensor([0.5, 3.0])
    expected = torch.log1p(torch.exp(-(chosen - rejected - margin)))
    torch.testing.assert_close(preference_loss(chosen, rejected, margin), expected)


def test_calibration_error_is_the_distance_between_claim_and_truth():
    claim = 0.8
    gap = math.log(claim / (1 - claim))
    # 8 of 10 right at a claim of 0.8; then 5 of 10.
    for right, error in ((8, 0.0), (5, 0.3), (10, 0.2)):
        gaps = torch.tensor([gap] * right + [-gap] * (10 - right), dtype=torch.float64)
        assert calibration_error(gaps, bins=1) == pytest.approx(error, abs=1e-9)
    unsure = torch.zeros(6, dtype=torch.float64)
    assert calibration_error(unsure) == pytest.approx(0)


def test_preference_loss_is_bradley_and_terrys():
    chosen, rejected = torch.tensor([0.0, 2.0, -30.0]), torch.tensor([0.0, 1.0, 30.0])
    expected = torch.tensor([math.log(2), math.log(1 + math.exp(-1)), 60.0])
    torch.testing.assert_close(preference_loss(chosen, rejected), expected)


def test_preference_gradient_pulls_the_sides_apart_by_the_probability_of_being_wrong():
    chosen, rejected = torch.tensor([1.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    preference_loss(chosen, rejected).backward()
    wrong = 1 / (1 + math.e)
    assert chosen.grad.item() == pytest.approx(-wrong)
    assert rejected.grad.item() == pytest.approx(wrong)


def test_logprobs_and_entropies_are_those_of_the_softmax():
    logits, tokens = draws(2, 3, 5), torch.tensor([[0, 1, 2], [4, 4, 0]])
    distribution = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(token_logprobs(logits, tokens), distribution.log_prob(tokens))
    torch.testing.assert_close(token_entropies(logits), distribution.entropy())
