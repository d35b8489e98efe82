"""Held-out loss of a language model, exact over all ranks, and the measures that follow from it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ultrathink_model.errors import DataError


class ScoredBatch(Protocol):
    """What the measure needs of a batch: to be moved, and to know how many tokens it predicts."""

    @property
    def num_tokens(self) -> int:
        """Labels that count."""
        ...

    def to(self, device: torch.device) -> Self:
        """The batch on `device`."""
        ...


class ScoredOutput(Protocol):
    """What the measure needs of a model's output."""

    loss_sum: Float[Tensor, ""] | None


AnyBatch = TypeVar("AnyBatch", bound=ScoredBatch)


@dataclass(frozen=True)
class ValidationLoss:
    """Mean cross-entropy of held-out text.

    Attributes:
        loss: Nats per predicted token.
        tokens: Predicted tokens, over all ranks.
    """

    loss: float
    tokens: int

    @property
    def nats(self) -> float:
        """Cross-entropy of the whole split."""
        return self.loss * self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that passes the largest float."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits that the model needs for each byte of the text the tokens stand for.

        Unlike perplexity it compares models across tokenizers.

        Args:
            text_bytes: UTF-8 bytes of the whole held-out text.
        """
        return bits_per_byte(self.nats, text_bytes)


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Total nats of a text as bits per byte of it: nats / (bytes · ln 2)."""
    if text_bytes <= 0:
        raise DataError(f"the held-out text has {text_bytes} bytes; bits per byte need at least one")
    return nats / (text_bytes * math.log(2))


@torch.no_grad()
def validation_loss(
    forward: Callable[[AnyBatch], ScoredOutput],
    loader: Iterable[AnyBatch],
    device: torch.device | str,
    all_reduce_sum: Callable[[Tensor], Tensor],
) -> ValidationLoss:
    """The true mean cross-entropy per token of a held-out split, over all ranks.

    Sums of nats and of tokens are added in float64 and divided once, so that neither uneven batches nor the number
    of ranks move the figure. Gradients are off; the caller has put the model in evaluation mode. Auxiliary losses
    do not count. Nothing waits for the device before the last batch.

    Args:
        forward: Runs the model on a batch with its labels.
        loader: This rank's batches.
        device: Where the batches are sent.
        all_reduce_sum: Sums a tensor over the ranks and returns it; the identity in one process.

    Raises:
        DataError: No rank had a token to predict.
    """
    device = torch.device(device)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    for batch in loader:
        loss_sum = forward(batch.to(device)).loss_sum
        assert loss_sum is not None, "validation_loss needs a forward that is given the labels"
        nats += loss_sum.double()
        tokens += batch.num_tokens
    totals = all_reduce_sum(torch.stack([nats, torch.tensor(float(tokens), dtype=torch.float64, device=device)]))
    total_nats, total_tokens = totals.tolist()
    if not total_tokens:
        raise DataError(
            "the validation split predicts 0 tokens; give the source longer documents, or lower data.validation_every"
        )
    return ValidationLoss(total_nats / total_tokens, int(total_tokens))
