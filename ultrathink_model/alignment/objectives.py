"""The terms that the algorithms share: whitening, KL estimates, clipped losses and advantages.

All are per token, shape (batch, response), so that the caller sums them over ranks and divides by the global count.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def whiten(
    values: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    all_reduce: Callable[[Tensor], Tensor],
) -> Float[Tensor, "batch response"]:
    """Values with zero mean and unit variance over the masked places of all ranks; 0 elsewhere.

    Args:
        values: Any finite numbers.
        mask: Places that count.
        all_reduce: Sums a tensor over the ranks.
    """
    count, total = all_reduce(torch.stack([mask.sum().to(values.dtype), (values * mask).sum()])).unbind()
    centred = (values - total / count.clamp(min=1)) * mask
    variance = all_reduce(centred.square().sum()) / (count - 1).clamp(min=1)
    # A round of equal advantages has nothing to teach; the bound keeps it from becoming amplified rounding.
    return centred * torch.rsqrt(variance.clamp(min=1e-8))


def kl_estimate(
    logprobs: Float[Tensor, "batch response"], reference_logprobs: Float[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """Estimate of KL(policy ‖ reference) in nats per token from tokens that the policy drew.

    With r = p_reference / p_policy it is r - 1 - log r: never negative, and unbiased, since the mean of r is 1
    (Schulman 2020, http://joschu.net/blog/kl-approx.html, "k3").
    """
    log_ratio = reference_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def exact_kl_and_entropy(
    logprobs: Float[Tensor, "batch response vocab"], reference_logprobs: Float[Tensor, "batch response vocab"]
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    """KL(policy ‖ reference) of the next-token distributions and the policy's entropy, in nats per token.

    Summed over tokens that the policy drew, the KL is an unbiased estimate of the sequence's, of lower variance than
    any estimate from the drawn tokens alone (Amini et al. 2025, arXiv 2504.10637).

    Args:
        logprobs: Normalised log-probabilities of the policy.
        reference_logprobs: Those of the reference.
    """
    probabilities = logprobs.exp()
    kl = (probabilities * (logprobs - reference_logprobs)).sum(-1)
    return kl, -(probabilities * logprobs).sum(-1)


def clipped_policy_loss(
    logprobs: Float[Tensor, "batch response"],
    old_logprobs: Float[Tensor, "batch response"],
    advantages: Float[Tensor, "batch response"],
    clip_range: float,
) -> tuple[Float[Tensor, "batch response"], Bool[Tensor, "batch response"]]:
    """PPO's clipped surrogate per token, -min(ρA, clip(ρ, 1-ε, 1+ε)A), and where the clip cut the gradient.

    ρ is the probability ratio of the policy to the one that drew the tokens (Schulman et al. 2017, arXiv 1707.06347).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages), clipped * advantages < ratio * advantages


def clipped_value_loss(
    values: Float[Tensor, "batch response"],
    old_values: Float[Tensor, "batch response"],
    returns: Float[Tensor, "batch response"],
    clip_range: float,
) -> Float[Tensor, "batch response"]:
    """Half the squared error per token, the greater of the value's own and that of the value held near its old one."""
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def generalized_advantages(
    rewards: Float[Tensor, "batch response"],
    values: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    gamma: float,
    gae_lambda: float,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    """Advantages by GAE, and the returns that the value head learns (advantages + values).

    A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} - V_t (Schulman et al. 2016, arXiv 1506.02438). A response is
    a whole episode: nothing comes after its last token, whether it stopped or ran out of tokens.

    Args:
        rewards: Reward of each token.
        values: Estimate, before each token is drawn, of the discounted rewards from it on.
        mask: True up to and including the last token of a response; padding follows.
        gamma: Discount γ in (0, 1].
        gae_lambda: λ in [0, 1].
    """
    rewards, values = rewards * mask, values * mask
    following = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    for position in reversed(range(values.size(1))):
        delta = rewards[:, position] + gamma * next_value - values[:, position]
        following = (delta + gamma * gae_lambda * following) * mask[:, position]
        advantages[:, position] = following
        next_value = values[:, position]
    return advantages, advantages + values


def group_advantages(scores: Float[Tensor, " batch"], group_size: int, scale: bool) -> Float[Tensor, " batch"]:
    """Each response's score against the mean of its prompt's group, in the group's standard deviations if `scale`.

    Scaled, it is GRPO's (Shao et al. 2024, arXiv 2402.03300); unscaled, Dr. GRPO's, which does not favour prompts whose
    scores lie close together (Liu et al. 2025, arXiv 2503.20783).

    Args:
        scores: Of responses in consecutive groups of `group_size`.
        group_size: Responses per prompt, at least 2.
        scale: Divide by the group's standard deviation.
    """
    groups = scores.view(-1, group_size)  # (prompts, group)
    centred = groups - groups.mean(1, keepdim=True)
    if scale:
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    return centred.reshape(-1)


def preference_loss(
    chosen: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " pairs"],
    margin: Float[Tensor, " pairs"] | float = 0.0,
) -> Float[Tensor, " pairs"]:
    """Bradley and Terry's -log σ(chosen - rejected - margin) of each pair, in nats.

    The margin is Llama 2's: pairs that people were surer of are to lie further apart (Touvron et al. 2023,
    arXiv 2307.09288, §3.2.2).
    """
    return -torch.nn.functional.logsigmoid(chosen - rejected - margin)


def calibration_error(gaps: Float[Tensor, " pairs"], bins: int = 10) -> float:
    """Expected calibration error of preferences: how far the share of pairs ranked right is from what was claimed.

    A gap d claims that its higher side is the better one with probability σ(|d|). Pairs are sorted by that claim into
    `bins` groups of equal size; the error is the mean over the pairs of |claimed - found| of their group.

    Args:
        gaps: Score of the chosen side less that of the rejected one.
        bins: Groups, at most; fewer pairs make fewer.
    """
    claimed = torch.sigmoid(gaps.abs()).double()
    right = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    order = claimed.argsort()
    groups = order.tensor_split(min(bins, len(gaps)))
    return float(sum(len(group) * (claimed[group].mean() - right[group].mean()).abs() for group in groups) / len(gaps))
