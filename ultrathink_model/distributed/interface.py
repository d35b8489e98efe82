"""What every strategy can do for the trainer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ultrathink_model.config import Config
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.distributed.state import same_mesh
from ultrathink_model.models.multimodal.media_encoder import MediaEncoder

MakeOptimizer = Callable[[nn.Module], Optimizer]


# What `clip_grads_with_norm_` adds to the norm.
CLIPPING_EPS = 1e-6


class Strategy(ABC):
    """How the ranks share the work on one model.

    A step is: for each micro-batch `model(…)`, then `backward`; then `gradient_norm_and_clip`, then `step`. Every
    rank makes the same calls in the same order. The gradient of a step is the sum over micro-batches and ranks of
    what `backward` was given, over `gradient_scale`: a loss divided by the tokens of the whole step and multiplied
    by `gradient_scale` gives the mean over tokens.

    Attributes:
        model: What to call for a forward pass, in training and in evaluation.
        unwrapped: The model as it was given to `prepare`, for its methods other than `forward`.
        optimizer: Its `param_groups` take the learning rate of each step.
        keeps_casts: Whether a weight's copy in 16 bits may be kept for the rest of a forward pass: not where the weights
            themselves are dropped after each block.
        is_sharded: Whether the weights are cut over the ranks, so that `unwrapped` is no model by itself.
        gradient_scale: The world size where the ranks' gradients are averaged, 1 where they are added.
    """

    name: ClassVar[str]
    keeps_casts: ClassVar[bool] = True
    is_sharded: bool = False
    gradient_scale: float = 1.0
    model: nn.Module
    unwrapped: nn.Module
    optimizer: Optimizer

    def __init__(self, config: Config, context: RankContext) -> None:
        self.config = config
        self.context = context

    @abstractmethod
    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Takes a model, whole and alike on every rank, moves it to the device and makes its optimizer.

        Args:
            model: Its weights may be replaced by shards of them.
            make_optimizer: Called once, with the module whose parameters are to be optimized.
        """

    @abstractmethod
    def backward(self, loss: Float[Tensor, ""], is_last_micro_step: bool) -> None:
        """Adds a micro-batch's gradient; ranks exchange theirs only with the last one of a step."""

    @abstractmethod
    def gradient_norm_and_clip(self, max_norm: float | None) -> Float[Tensor, ""]:
        """The norm of the step's whole gradient, over all ranks, which is then scaled down to `max_norm`.

        Returns:
            The norm before clipping, alike on all ranks; not finite when any part of the gradient is not.
        """

    @abstractmethod
    def step(self) -> None:
        """Moves the weights along the gradient and forgets it."""

    @abstractmethod
    def skip_step(self) -> None:
        """Forgets the gradient and moves nothing."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state by the names of the unwrapped model, as tensors or DTensors.

        `{"model": {name: tensor}, "optimizer": {name: {key: tensor}}}`, with the same names under every strategy,
        so that torch.distributed.checkpoint loads what one strategy saved into another. It has its full form before
        the first step too. Learning rates are not in it: the schedule sets them at each step.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state in the form that `state_dict` has here, usually the same one, filled by DCP."""

    def to_saved(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that lies over the ranks as the weight `name` does, as `state_dict` has it."""
        return tensor

    def to_live(self, name: str, tensor: Tensor) -> Tensor:
        """The reverse of `to_saved`."""
        return tensor

    def full_model_state(self) -> dict[str, Tensor]:
        """The whole weights in host memory, on rank 0; the other ranks help and get none."""
        return {name: whole.to("cpu", copy=True) for name, whole in self._whole_weights() if self.context.is_main}

    @torch.no_grad()
    def copy_weights_to(self, model: nn.Module) -> None:
        """Sets the weights and buffers of a whole model to this one's; every rank calls it together."""
        own = model.state_dict()
        for name, whole in self._whole_weights():
            own[name].copy_(whole)

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Takes over whole weights and buffers, alike on every rank, and leaves the optimizer as it is."""
        state = self.state_dict()
        for name, tensor in state["model"].items():
            value = weights[name].to(tensor.device)
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
            state["model"][name] = value
        self.load_state_dict(state)

    def _whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Weights and buffers, gathered one at a time."""
        for name, part in self.unwrapped.state_dict().items():
            tensor = self.to_saved(name, part)
            yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()

    def _clip(self, max_norm: float | None) -> Float[Tensor, ""]:
        """Norm and clipping for gradients that lie in `parameter.grad`, whole or as DTensors."""
        alike = same_mesh([parameter for parameter in self.unwrapped.parameters() if parameter.grad is not None])
        norms = []
        for parameters in alike:
            norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        norm = nn.utils.get_total_norm(norms) if len(norms) > 1 else norms[0]
        # On a processor the norm is at hand: a gradient within the bound, which would be multiplied by one, is let be.
        within = norm.device.type == "cpu" and max_norm is not None and bool(norm + CLIPPING_EPS <= max_norm)
        if max_norm is not None and not within:
            for parameters in alike:
                nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm.detach()

    def _move_to_device(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, MediaEncoder):
                module.runs_always = self.name != "single"
        return model.to(self.context.device) if self.context.device != torch.device("cpu") else model
