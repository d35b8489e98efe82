"""The guard of generation: it reads the harm head after every token and ends or redirects what turns harmful."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ultrathink_model.errors import ConfigError
from ultrathink_model.models.transformer import Transformer


@dataclass(frozen=True)
class Guard:
    """When to take the word from the model, and what is said instead.

    A row is taken over once the harm head gives any category more than its threshold. The token that raised the
    score has been written by then; the next one has not.

    Attributes:
        threshold: Probability of harm, 0 to 1, of every category that `thresholds` does not name.
        thresholds: Other thresholds by category; 1 lets a category pass.
        redirect: Tokens that are written in place of the model's, after which the row ends; none just ends it.
    """

    threshold: float = 0.5
    thresholds: Mapping[str, float] = field(default_factory=dict)
    redirect: Sequence[int] = ()


class GuardedRows:
    """The rows of one generation under a guard.

    Args:
        model: Has a harm head.
        guard: The guard.
        prompts: The prompts, for their shape and device.

    Attributes:
        rows: Rows that are taken over, (batch,).

    Raises:
        ConfigError: The model has no harm head, or the guard names a category or a threshold that cannot be.
    """

    def __init__(self, model: Transformer, guard: Guard, prompts: Int[Tensor, "batch prompt"]) -> None:
        if model.harm_head is None:
            raise ConfigError(
                "guard: the model has no harm head to read; train one with advanced.enable_constitutional=true, "
                "or generate without a guard"
            )
        categories = model.config.advanced.harm_categories
        unknown = [name for name in guard.thresholds if name not in categories]
        if unknown:
            raise ConfigError(f"guard: {unknown[0]!r} is no harm category; take one of {', '.join(categories)}")
        limits = [guard.thresholds.get(name, guard.threshold) for name in categories]
        if not all(0 <= limit <= 1 for limit in limits):
            raise ConfigError(f"guard: the thresholds {limits} must be probabilities, from 0 to 1")
        device = prompts.device
        self._head = model.harm_head
        self._limits = torch.tensor(limits, device=device)
        self._redirect = torch.tensor(list(guard.redirect), dtype=prompts.dtype, device=device)
        self._written = torch.zeros(prompts.shape[0], dtype=torch.long, device=device)
        self.rows = torch.zeros(prompts.shape[0], dtype=torch.bool, device=device)

    def step(
        self,
        hidden: Float[Tensor, "batch hidden"],
        drawn: Int[Tensor, " batch"],
        logprobs: Float[Tensor, " batch"],
        active: Bool[Tensor, " batch"],
    ) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """What stands in place of the drawn tokens, their log-probabilities, and which rows go on.

        Args:
            hidden: State after the text so far.
            drawn: Tokens that the model would write next.
            logprobs: Their log-probabilities.
            active: Rows that have not ended.
        """
        harmful = (self._head(hidden).sigmoid() > self._limits).any(-1)
        self.rows = self.rows | (harmful & active)
        has_words = self._written < len(self._redirect)
        active = active & (~self.rows | has_words)
        if len(self._redirect):
            words = self._redirect[self._written.clamp_max(len(self._redirect) - 1)]
            drawn, logprobs = words.where(self.rows, drawn), logprobs.where(~self.rows, 0.0)
        self._written = self._written + (self.rows & active)
        return drawn, logprobs, active
