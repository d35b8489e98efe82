"""Proximal policy optimisation of a language model with a value head (Ziegler et al. 2019, arXiv 1909.08593)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ultrathink_model.alignment.experience import Experience, Terms, make_terms
from ultrathink_model.alignment.learner import Learner
from ultrathink_model.alignment.objectives import (
    clipped_policy_loss,
    clipped_value_loss,
    generalized_advantages,
    whiten,
)
from ultrathink_model.alignment.rollout import Rollout
from ultrathink_model.alignment.sequences import response_states, token_entropies, token_logprobs
from ultrathink_model.config.rlhf import RLHFConfig
from ultrathink_model.distributed.context import all_reduce_sum


class ValueHead(nn.Module):
    """Two layers from a hidden state to the reward that is still to come; it starts at zero."""

    def __init__(self, hidden_size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.outer = nn.Linear(hidden_size, 1)
        with torch.no_grad():
            self.inner.weight.normal_(0.0, hidden_size**-0.5, generator=generator)
            self.inner.bias.zero_()
            self.outer.weight.zero_()
            self.outer.bias.zero_()

    def forward(self, hidden: Float[Tensor, "batch response hidden"]) -> Float[Tensor, "batch response"]:
        """The value of each state."""
        return self.outer(nn.functional.silu(self.inner(hidden.float()))).squeeze(-1)


class PPO:
    """The policy and its value head learn from the score of each response and a price on each token's KL.

    The reward of a token is -β (log π - log π_ref), and that of the last one also the score. Advantages come from GAE;
    the objective of a minibatch is the clipped policy loss, `value_weight` times the clipped value loss and
    `-entropy_weight` times the entropy, each a mean over tokens.

    The value head reads the policy's own states, and its loss reaches the trunk. Figures that decided it: docs/log.md.
    """

    group_size = 1
    controls_kl = True

    def __init__(self, rlhf: RLHFConfig) -> None:
        self._rlhf = rlhf

    def prepare(self, rollout: Rollout, kl_weight: float, first_row: int) -> Experience:
        """Advantages and returns of a round."""
        rlhf, mask = self._rlhf, rollout.sequences.response_mask
        rewards = token_rewards(rollout, kl_weight)
        advantages, returns = generalized_advantages(rewards, rollout.values, mask, rlhf.gamma, rlhf.gae_lambda)
        if rlhf.whiten_advantages:
            advantages = whiten(advantages, mask, all_reduce_sum)
        return Experience(
            rollout.sequences, rollout.logprobs, rollout.reference_logprobs, advantages, rollout.values, returns
        )

    def terms(self, learner: Learner, rows: Experience) -> Terms:
        """The objective of a minibatch, with the clipped policy and value losses."""
        rlhf = self._rlhf
        assert learner.head is not None, "PPO needs a value head"
        logits, hidden = response_states(learner.forward, rows.sequences, rlhf.temperature)
        logprobs = token_logprobs(logits, rows.sequences.responses)
        policy, clipped = clipped_policy_loss(logprobs, rows.old_logprobs, rows.advantages, rlhf.clip_range)
        value = clipped_value_loss(learner.head(hidden), rows.old_values, rows.returns, rlhf.value_clip_range)
        loss = policy + rlhf.value_weight * value
        if rlhf.entropy_weight:
            loss = loss - rlhf.entropy_weight * token_entropies(logits)
        parts = {"policy_loss": policy, "value_loss": value, "clip_fraction": clipped}
        return make_terms(rows, logprobs.detach(), loss, parts)


def token_rewards(rollout: Rollout, kl_weight: float) -> Float[Tensor, "batch response"]:
    """The reward of each token: the price of its KL, and at the response's last token the score."""
    mask = rollout.sequences.response_mask
    rewards = -kl_weight * (rollout.logprobs - rollout.reference_logprobs) * mask
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, rollout.scores[:, None].to(rewards.dtype))
