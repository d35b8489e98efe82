"""Direct preference optimisation: the policy learns from the pairs themselves, not from a reward."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ultrathink_model.alignment.draws import PAIR_ORDER, endless_order
from ultrathink_model.alignment.experience import Terms
from ultrathink_model.alignment.learner import Learner
from ultrathink_model.alignment.objectives import preference_loss
from ultrathink_model.alignment.pairs import TokenPair
from ultrathink_model.alignment.precision import in_run_precision
from ultrathink_model.alignment.rollout import Rollout
from ultrathink_model.alignment.sequences import Forward, Sequences, make_sequences, response_states, token_logprobs
from ultrathink_model.config import Config
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.models.transformer import Transformer


@dataclass(frozen=True)
class PairRows:
    """Pairs with the log-probability, in nats, that the reference gives to each side.

    Attributes:
        sides: All chosen responses, then all rejected ones, (2 · pairs, …).
        reference_logprobs: Of each side, (2 · pairs,).
    """

    sides: Sequences
    reference_logprobs: Float[Tensor, " sides"]

    def __len__(self) -> int:
        return len(self.sides) // 2

    def select(self, rows: Int[Tensor, " rows"]) -> "PairRows":
        """Some of the pairs."""
        both = torch.cat([rows, rows + len(self)])
        return PairRows(self.sides.select(both), self.reference_logprobs[both])


class DPO:
    """Raises what is chosen against what is rejected, relative to the reference (Rafailov et al. 2023, arXiv 2305.18290).

    The loss of a pair is -log σ(β (log π/π_ref of the chosen - log π/π_ref of the rejected)). A round takes as many
    training pairs as the other algorithms take rollouts. The rollouts are drawn all the same, so that reward and KL
    are reported alike; nothing is learnt from them.
    """

    group_size = 1
    controls_kl = False

    def __init__(
        self, config: Config, pairs: Sequence[TokenPair], reference: Transformer, pad_id: int, context: RankContext
    ) -> None:
        self._rlhf, self._seed = config.rlhf, config.training.seed
        self._pairs, self._reference, self._pad_id, self._context = pairs, reference, pad_id, context

    @torch.no_grad()
    def prepare(self, rollout: Rollout, kl_weight: float, first_row: int) -> PairRows:
        """This rank's share of the next training pairs, one for each rollout."""
        count = len(rollout.sequences)
        first = first_row + self._context.rank * count
        order = endless_order(first, count, len(self._pairs), self._seed, PAIR_ORDER)
        pairs = [self._pairs[index] for index in order]
        sides = make_sequences(
            [pair.prompt for pair in pairs] * 2,
            [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs],
            self._pad_id,
            self._context.device,
        )
        reference = in_run_precision(self._reference.config, self._reference, self._context.device)
        size = self._rlhf.ppo_minibatch_size
        parts = [
            response_logprobs(reference, sides.select(slice(start, start + size)), self._rlhf.temperature)
            for start in range(0, len(sides), size)
        ]
        return PairRows(sides, torch.cat(parts))

    def terms(self, learner: Learner, rows: PairRows) -> Terms:
        """The loss of a minibatch of pairs, and the margin between their sides."""
        logprobs = response_logprobs(learner.forward, rows.sides, self._rlhf.temperature)
        chosen, rejected = (self._rlhf.dpo_beta * (logprobs - rows.reference_logprobs)).chunk(2)
        loss = preference_loss(chosen, rejected)
        sums = {"policy_loss": loss.detach().sum(), "margin": (chosen - rejected).detach().sum()}
        return Terms(loss.sum(), torch.tensor(float(len(rows)), device=loss.device), sums)


def response_logprobs(forward: Forward, sequences: Sequences, temperature: float) -> Float[Tensor, " batch"]:
    """Log-probability of each whole response after its prompt, in nats."""
    logits, _ = response_states(forward, sequences, temperature)
    return (token_logprobs(logits, sequences.responses) * sequences.response_mask).sum(1)
