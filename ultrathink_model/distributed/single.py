"""One process, nothing shared."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ultrathink_model.distributed.expert_parallel import ExpertParallel
from ultrathink_model.distributed.interface import MakeOptimizer, Strategy
from ultrathink_model.distributed.state import load_optimizer_state, optimizer_state
from ultrathink_model.distributed.tensor_parallel import TensorParallel


class SingleStrategy(Strategy):
    """The model as it is. Strategies that keep weights and gradients in the module build on this one."""

    name = "single"
    experts: ExpertParallel | None = None
    tensors: TensorParallel | None = None

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Moves the model to the device, and leaves this rank its part of what is cut over ranks."""
        self.unwrapped = self._move_to_device(model)
        if self.config.distributed.expert_parallel_size > 1:
            self.experts = ExpertParallel(self.config.distributed.expert_parallel_size, self.context)
            self.experts.cut(self.unwrapped)
        if self.context.tensor_parallel_size > 1:
            self.tensors = TensorParallel(self.context)
            self.tensors.cut(self.unwrapped)
        self.model = self._wrap(self.unwrapped)
        self.optimizer = make_optimizer(self.unwrapped)

    def backward(self, loss: Float[Tensor, ""], is_last_micro_step: bool) -> None:
        """Adds a micro-batch's gradient."""
        loss.backward()
        if self.experts and is_last_micro_step:
            self.experts.sum_gradients()
        if self.tensors and is_last_micro_step:
            self.tensors.sum_gradients()

    def gradient_norm_and_clip(self, max_norm: float | None) -> Float[Tensor, ""]:
        """The norm of the gradient, which is then clipped."""
        return self._clip(max_norm)

    def step(self) -> None:
        """Moves the weights and forgets the gradient."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def skip_step(self) -> None:
        """Forgets the gradient."""
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The live weights and optimizer state, but for copies of packed weights that are cut over `tp`.

        What is loaded into the live ones is in effect at once.
        """
        state = {
            "model": self.unwrapped.state_dict(),
            "optimizer": optimizer_state(self.optimizer, self.unwrapped),
        }
        return _by_weight(state, self.to_saved)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies what is not already in place."""
        state = _by_weight(state, self.to_live)
        self.unwrapped.load_state_dict(state["model"])
        load_optimizer_state(self.optimizer, self.unwrapped, state["optimizer"])

    def to_saved(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that lies over the ranks as the weight `name` does, as `state_dict` has it."""
        return self.tensors.to_saved(name, tensor) if self.tensors else tensor

    def to_live(self, name: str, tensor: Tensor) -> Tensor:
        """The reverse of `to_saved`."""
        return self.tensors.to_live(name, tensor) if self.tensors else tensor

    def _wrap(self, model: nn.Module) -> nn.Module:
        return model


def _by_weight(state: dict[str, Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """A state with each tensor changed, by the name of its weight."""
    return {
        "model": {name: change(name, tensor) for name, tensor in state["model"].items()},
        "optimizer": {
            name: {key: change(name, tensor) for key, tensor in tensors.items()}
            for name, tensors in state["optimizer"].items()
        },
    }
