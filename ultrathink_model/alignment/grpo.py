"""Group-relative policy optimisation: a prompt's other responses take the value head's place."""

import torch

from ultrathink_model.alignment.experience import Experience, Terms, make_terms
from ultrathink_model.alignment.learner import Learner
from ultrathink_model.alignment.objectives import clipped_policy_loss, group_advantages, kl_estimate
from ultrathink_model.alignment.rollout import Rollout
from ultrathink_model.alignment.sequences import response_states, token_entropies, token_logprobs
from ultrathink_model.config.rlhf import RLHFConfig


class GRPO:
    """Each response is compared with the mean score of its prompt's group (Shao et al. 2024, arXiv 2402.03300).

    The KL penalty stands in the loss, with the estimate r - 1 - log r. `whiten_advantages` divides by the group's
    standard deviation. Ours takes the mean over all tokens of a minibatch and not over each response first, so that a
    token of a long response weighs as much as one of a short response (Yu et al. 2025, arXiv 2503.14476).
    """

    controls_kl = True

    def __init__(self, rlhf: RLHFConfig) -> None:
        self._rlhf = rlhf
        self._kl_weight = rlhf.kl_weight
        self.group_size = rlhf.group_size

    def prepare(self, rollout: Rollout, kl_weight: float, first_row: int) -> Experience:
        """The advantage of each response, at each of its tokens."""
        self._kl_weight = kl_weight
        advantages = group_advantages(rollout.scores, self.group_size, self._rlhf.whiten_advantages)
        nothing = torch.zeros_like(rollout.logprobs)
        return Experience(
            rollout.sequences,
            rollout.logprobs,
            rollout.reference_logprobs,
            advantages[:, None].expand_as(rollout.logprobs),
            nothing,
            nothing,
        )

    def terms(self, learner: Learner, rows: Experience) -> Terms:
        """The objective of a minibatch, with its clipped policy loss."""
        rlhf = self._rlhf
        logits, _ = response_states(learner.forward, rows.sequences, rlhf.temperature)
        logprobs = token_logprobs(logits, rows.sequences.responses)
        policy, clipped = clipped_policy_loss(logprobs, rows.old_logprobs, rows.advantages, rlhf.clip_range)
        loss = policy + self._kl_weight * kl_estimate(logprobs, rows.reference_logprobs)
        if rlhf.entropy_weight:
            loss = loss - rlhf.entropy_weight * token_entropies(logits)
        return make_terms(rows, logprobs.detach(), loss, {"policy_loss": policy, "clip_fraction": clipped})
