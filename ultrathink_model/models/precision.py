"""The number format that matrix products run in."""

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The format autocast would give a product of `x`; its own where autocast is off.

    For products that autocast does not know, such as grouped ones and those inside a hand-made backward pass.
    """
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
