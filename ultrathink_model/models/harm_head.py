"""The harm head: what the model thinks a text would do harm to, read from its own states."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class HarmHead(nn.Module):
    """One logit for each harm category from the state at a token, which has seen the text up to there.

    A category is judged by itself: a text can do several kinds of harm, or none. Every token of a labelled text is
    trained on, so that the sigmoid of a logit is the share of texts that begin so and turn out harmful, which is what
    a guard must know in the middle of a text.
    """

    def __init__(self, hidden_size: int, categories: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(categories, hidden_size))
        self.bias = nn.Parameter(torch.empty(categories))

    def initialise(self, generator: torch.Generator, spread: float) -> None:
        """Draws the weights."""
        self.weight.normal_(0.0, spread, generator=generator)
        self.bias.zero_()

    def forward(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows categories"]:
        """The logits, in float32 whatever the precision of the run."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float(), self.bias.float())

    def loss_sum(
        self, hidden: Float[Tensor, "batch seq hidden"], harm_labels: Int[Tensor, "labelled seq"] | None
    ) -> Float[Tensor, ""]:
        """Binary cross-entropy in nats, a mean over the categories and a sum over the labelled tokens.

        Args:
            hidden: States of a batch whose last rows are labelled.
            harm_labels: Bit c is set where category c applies; None where no row is labelled, and then the loss is a
                zero in which the head takes part, since data-parallel wrappers wait for the gradient of every weight.
        """
        if harm_labels is None:
            return 0.0 * (self.weight.sum() + self.bias.sum())
        logits = self(hidden[-harm_labels.shape[0] :])  # (labelled, seq, categories)
        bits = torch.arange(logits.shape[-1], device=logits.device)
        targets = (harm_labels.unsqueeze(-1) >> bits) & 1
        losses = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
        return losses.mean(-1).sum()
