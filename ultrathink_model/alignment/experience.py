"""What a round of rollouts becomes for the update, and what a minibatch of it says."""

from dataclasses import dataclass, field
from typing import Protocol, Self, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ultrathink_model.alignment.learner import Learner
from ultrathink_model.alignment.objectives import kl_estimate
from ultrathink_model.alignment.rollout import Rollout
from ultrathink_model.alignment.sequences import Sequences


class Rows(Protocol):
    """Rows that an update is made from, in minibatches."""

    def __len__(self) -> int:
        """This rank's rows."""
        ...

    def select(self, rows: Int[Tensor, " rows"]) -> Self:
        """Some of the rows."""
        ...


@dataclass(frozen=True)
class Experience:
    """Rollouts with the advantage of each token.

    Attributes:
        sequences: Prompts with the drawn responses.
        old_logprobs: Of the drawn tokens under the policy that the round began with.
        reference_logprobs: The same under the frozen reference.
        advantages: How much better each token was than expected.
        old_values: Value estimates at the round's beginning; zeros without a value head.
        returns: What the value head learns; zeros without one.
    """

    sequences: Sequences
    old_logprobs: Float[Tensor, "batch response"]
    reference_logprobs: Float[Tensor, "batch response"]
    advantages: Float[Tensor, "batch response"]
    old_values: Float[Tensor, "batch response"]
    returns: Float[Tensor, "batch response"]

    def __len__(self) -> int:
        return len(self.sequences)

    def select(self, rows: Int[Tensor, " rows"]) -> "Experience":
        """Some of the rollouts."""
        return Experience(
            self.sequences.select(rows),
            self.old_logprobs[rows],
            self.reference_logprobs[rows],
            self.advantages[rows],
            self.old_values[rows],
            self.returns[rows],
        )


@dataclass(frozen=True)
class Terms:
    """The objective of one rank's minibatch, as sums that add up over ranks.

    Attributes:
        loss: Objective, summed over what `count` counts.
        count: Tokens, or pairs.
        sums: Parts of the objective by name, for the log, summed likewise.
        kl_change: How far the KL to the reference has moved since the rollout, in nats, summed over responses; None
            where nothing was drawn from the policy.
    """

    loss: Float[Tensor, ""]
    count: Float[Tensor, ""]
    sums: dict[str, Tensor] = field(default_factory=dict)
    kl_change: Float[Tensor, ""] | None = None


def make_terms(
    rows: Experience,
    logprobs: Float[Tensor, "batch response"],
    loss: Float[Tensor, "batch response"],
    parts: dict[str, Tensor],
) -> Terms:
    """Sums over the response tokens of a minibatch.

    The KL's change is taken on the tokens that the round's first policy drew: the present policy's estimate, each
    token weighted by its probability ratio, less that of the policy that drew it.

    Args:
        rows: The minibatch.
        logprobs: Of the drawn tokens under the present policy, without gradient.
        loss: Objective of each token.
        parts: What the log shows of it, of each token.
    """
    mask = rows.sequences.response_mask
    now = torch.exp(logprobs - rows.old_logprobs) * kl_estimate(logprobs, rows.reference_logprobs)
    before = kl_estimate(rows.old_logprobs, rows.reference_logprobs)
    return Terms(
        (loss * mask).sum(),
        mask.sum().float(),
        {name: (part.detach() * mask).sum() for name, part in parts.items()},
        ((now - before) * mask).sum(),
    )


AnyRows = TypeVar("AnyRows", bound=Rows)


class Algorithm(Protocol[AnyRows]):
    """One way to learn from rewards or preferences: a small file beside this one.

    Attributes:
        group_size: Responses that are drawn to each prompt of a round.
        controls_kl: Whether the objective holds the KL penalty, and so can bring the policy back.
    """

    group_size: int
    controls_kl: bool

    def prepare(self, rollout: Rollout, kl_weight: float, first_row: int) -> AnyRows:
        """This rank's rows of a round.

        Args:
            rollout: What the policy just drew.
            kl_weight: Price of a nat of KL in units of reward.
            first_row: Rows of the rounds before, over all ranks.
        """
        ...

    def terms(self, learner: Learner, rows: AnyRows) -> Terms:
        """The objective of a minibatch under the present policy."""
        ...
