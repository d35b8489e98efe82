"""A trunk and a small head on its states, updated together."""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW

from ultrathink_model.alignment.sequences import Forward
from ultrathink_model.config import Config
from ultrathink_model.distributed.context import RankContext, all_reduce_sum
from ultrathink_model.distributed.state import load_optimizer_state, optimizer_state
from ultrathink_model.distributed.strategy import make_strategy
from ultrathink_model.models.transformer import Transformer


class Learner:
    """A language model under the run's strategy with a head that every rank holds whole.

    The head stays outside the strategy, which knows decoders only; its few weights' gradients are summed here. Both
    have AdamW without weight decay, which would pull the policy towards zero instead of towards its reference. The
    trunk stays in evaluation mode (see `response_states`).

    Args:
        config: Clipping, AdamW's constants and the strategy.
        context: This rank.
        trunk: The language model; alike on every rank.
        head: Reads the trunk's hidden states; alike on every rank. None for none.
        learning_rate: Of the trunk.
        head_learning_rate: Of the head.
    """

    def __init__(
        self,
        config: Config,
        context: RankContext,
        trunk: Transformer,
        head: nn.Module | None,
        learning_rate: float,
        head_learning_rate: float,
    ) -> None:
        self.context = context
        self._max_norm = config.training.gradient_clipping
        self._strategy = make_strategy(config, context)
        self._strategy.prepare(trunk, lambda module: _adamw(config, module, learning_rate))
        self._strategy.model.eval()
        self.head = None if head is None else head.to(context.device)
        self._head_optimizer = None if self.head is None else _adamw(config, self.head, head_learning_rate)
        self._rates = (learning_rate, head_learning_rate)

    @property
    def forward(self) -> Forward:
        """The trunk's forward, through the strategy."""
        return cast(Forward, self._strategy.model)

    @property
    def trunk(self) -> Transformer:
        """The trunk itself, for generation and for saving."""
        return cast(Transformer, self._strategy.unwrapped)

    def backward(self, loss: Float[Tensor, ""], is_last: bool = True) -> None:
        """Adds the gradient of a loss that is this rank's part of a sum over ranks."""
        self._strategy.backward(loss * self._strategy.gradient_scale, is_last)

    def step(self) -> Float[Tensor, ""]:
        """Clips and moves the weights; a gradient that is not finite moves nothing.

        Returns:
            The norm of the trunk's gradient before clipping.
        """
        norm = self._strategy.gradient_norm_and_clip(self._max_norm)
        if not torch.isfinite(norm):
            self._strategy.skip_step()
            self._zero_head()
            return norm
        self._strategy.step()
        if self.head is not None and self._head_optimizer is not None:
            for parameter in self.head.parameters():
                assert parameter.grad is not None, "the head takes part in every loss"
                all_reduce_sum(parameter.grad)
            if self._max_norm is not None:
                nn.utils.clip_grad_norm_(self.head.parameters(), self._max_norm)
            self._head_optimizer.step()
        self._zero_head()
        return norm

    def scale_rates(self, factor: float) -> None:
        """Sets both learning rates to `factor` of what they were made with."""
        optimizers = (self._strategy.optimizer, self._head_optimizer)
        for optimizer, rate in zip(optimizers, self._rates, strict=True):
            for group in () if optimizer is None else optimizer.param_groups:
                group["lr"] = rate * factor

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state of trunk and head, as tensors by name."""
        state = self._strategy.state_dict()
        if self.head is not None and self._head_optimizer is not None:
            state["head"] = self.head.state_dict()
            state["head_optimizer"] = optimizer_state(self._head_optimizer, self.head)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self._strategy.load_state_dict(state)
        if self.head is not None and self._head_optimizer is not None:
            self.head.load_state_dict(state["head"])
            load_optimizer_state(self._head_optimizer, self.head, state["head_optimizer"])

    def _zero_head(self) -> None:
        if self._head_optimizer is not None:
            self._head_optimizer.zero_grad()


def _adamw(config: Config, module: nn.Module, rate: float) -> AdamW:
    training = config.training
    betas = (training.adam_beta1, training.adam_beta2)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return AdamW(parameters, lr=rate, betas=betas, eps=training.adam_eps, weight_decay=0.0)
