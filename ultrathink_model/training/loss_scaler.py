"""Loss scaling for fp16, whose gradients would otherwise vanish below its smallest number."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000


class LossScaler:
    """A scale on the loss that doubles after 2,000 good steps and halves at each bad one (arXiv 1710.03740).

    It does what `torch.amp.GradScaler` does, but takes its verdict from outside: that one asks each rank's own
    gradients, so that ranks which hold different shards would come to different scales. Its state is two tensors on
    the device, and nothing here waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._scale = torch.full((), FIRST_SCALE, device=device)
        self._good_steps = torch.zeros((), device=device)

    def scale(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The loss times the scale."""
        return loss * self._scale

    def unscale(self, module: nn.Module) -> None:
        """Divides the gradients by the scale, in place."""
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients]
        torch._foreach_mul_(local, 1 / self._scale)

    def update(self, bad: Bool[Tensor, ""]) -> None:
        """Adapts the scale to a step, whose gradient over all ranks was finite or bad."""
        self._good_steps.copy_(torch.where(bad, 0, self._good_steps + 1))
        grow = self._good_steps >= GROWTH_STEPS
        self._scale.mul_(torch.where(bad, 0.5, torch.where(grow, 2.0, 1.0)))
        self._good_steps.masked_fill_(grow, 0)

    def state_dict(self) -> dict[str, Tensor]:
        """The live state: what is loaded into these tensors is in effect at once."""
        return {"scale": self._scale, "good_steps": self._good_steps}
