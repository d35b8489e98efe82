"""The exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.distributed.tensor import DTensor

from ultrathink_model.distributed.interface import Strategy
from ultrathink_model.errors import ConfigError


class WeightAverage:
    """A running mean of the weights, which evaluation and the final model take in their place.

    After step t the mean moves by 1 - d towards the weights, where d = min(`decay`, (1 + t) / (10 + t)), so that the
    first steps do not weigh on it for long. Under sharding each rank keeps the mean of its own shards.
    """

    def __init__(self, strategy: Strategy, decay: float) -> None:
        """Begins at the weights as they are.

        Args:
            strategy: A prepared strategy.
            decay: Share of the mean that a step keeps, below 1.

        Raises:
            ConfigError: The strategy keeps the weights where we cannot reach them.
        """
        if strategy.name == "deepspeed":
            raise ConfigError(
                f"training.ema_decay={decay} averages the weights in place, and distributed.strategy=deepspeed cuts "
                "them into pieces of its own; take distributed.strategy=fsdp, or set training.ema_decay=null"
            )
        self._strategy, self._decay = strategy, decay
        self._mean = {name: torch.empty_like(weight) for name, weight in self._weights().items()}
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """Sets the mean to the weights as they are."""
        for name, weight in self._weights().items():
            self._mean[name].copy_(weight)

    @torch.no_grad()
    def update(self, step: int, bad: Bool[Tensor, ""]) -> None:
        """Moves the mean after a step, unless the step was bad.

        Args:
            step: Optimizer steps done.
            bad: Whether the step moved nothing.
        """
        weights = self._weights()
        means = [_local(mean) for mean in self._mean.values()]
        changes = torch._foreach_sub([_local(weights[name]) for name in self._mean], means)
        torch._foreach_mul_(changes, ((1 - min(self._decay, (1 + step) / (10 + step))) * ~bad).to(means[0].device))
        torch._foreach_add_(means, changes)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Has the model hold the mean while it is open, and its own weights afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        """The mean as `Strategy.state_dict` has the weights; most of it live."""
        return {name: self._strategy.to_saved(name, mean) for name, mean in self._mean.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a mean in that form."""
        for name, mean in self._mean.items():
            if state[name] is not mean:
                mean.copy_(self._strategy.to_live(name, state[name]))

    @torch.no_grad()
    def _swap(self) -> None:
        weights = self._weights()
        for name, mean in self._mean.items():
            own, other = _local(weights[name]), _local(mean)
            kept = own.clone()
            own.copy_(other)
            other.copy_(kept)

    def _weights(self) -> dict[str, Tensor]:
        """The live weights; to ask for a state has FSDP drop what it gathered, so that they are the shards."""
        module = self._strategy.unwrapped
        state = module.state_dict()
        return {name: state[name] for name, _ in module.named_parameters()}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
