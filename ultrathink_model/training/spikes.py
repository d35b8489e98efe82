"""Loss spikes: steps whose loss stands far above what the steps before it had."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

WINDOW = 64
# A median and a spread of fewer losses mean little.
LEAST_LOSSES = 16
# Of a normal distribution, the standard deviation in units of the median absolute deviation.
NORMAL_SPREAD = 1.4826
# A loss that hardly moves has a spread of nearly nothing, beside which any loss is far away.
LEAST_SPREAD = 1e-3


class SpikeDetector:
    """Holds the losses of the last 64 good steps against the next one.

    A loss is a spike when it lies more than `deviations` robust standard deviations above their median, where the
    robust deviation is 1.4826 times the median absolute deviation. Its state is a tensor on the device, and nothing
    here waits for it.
    """

    def __init__(self, deviations: float, device: torch.device) -> None:
        self._deviations = deviations
        self._losses = torch.full((WINDOW,), torch.nan, device=device)

    def is_spike(self, loss: Float[Tensor, ""]) -> Bool[Tensor, ""]:
        """Whether the loss of a step, its mean over all ranks, is a spike; NaN is none."""
        median = self._losses.nanmedian()
        spread = NORMAL_SPREAD * (self._losses - median).abs().nanmedian()
        bound = median + self._deviations * torch.maximum(spread, LEAST_SPREAD * median.abs())
        return (loss > bound) & ((~self._losses.isnan()).sum() >= LEAST_LOSSES)

    def note(self, loss: Float[Tensor, ""], bad: Bool[Tensor, ""]) -> None:
        """Takes in the loss of a step, unless the step was bad."""
        moved = torch.cat([self._losses[1:], loss.to(self._losses).view(1)])
        self._losses.copy_(torch.where(bad, self._losses, moved))

    def state_dict(self) -> dict[str, Tensor]:
        """The live state: what is loaded into these tensors is in effect at once."""
        return {"losses": self._losses}
