"""Has a model take the operators of this folder."""

from torch import nn

from ultrathink_model.models.attention import Attention, FeedForward
from ultrathink_model.models.linear import Linear
from ultrathink_model.models.moe import MixtureOfExperts
from ultrathink_model.models.native.attention import attend
from ultrathink_model.models.native.experts import mix_experts
from ultrathink_model.models.native.feed_forward import feed_forward
from ultrathink_model.models.native.library import library
from ultrathink_model.models.native.linear import linear
from ultrathink_model.models.native.loss import chunk_losses
from ultrathink_model.models.native.norm import rms_norm
from ultrathink_model.models.norm import RMSNorm
from ultrathink_model.models.transformer import Transformer

NATIVE: dict[type[nn.Module], object] = {
    Attention: attend,
    FeedForward: feed_forward,
    Linear: linear,
    MixtureOfExperts: mix_experts,
    RMSNorm: rms_norm,
    Transformer: chunk_losses,
}


# What takes the weights of modules below it, without calling these.
WITH_PARTS = (Attention, FeedForward)


def use_native_kernels(model: nn.Module, *, weights_come_when_called: bool = False) -> bool:
    """Has a model, or a part of one, take operators in C++ for all that they can take.

    The modules stay what they are: a copy of them beside exported weights has no C++, and needs none.

    Args:
        model: What is to be faster.
        weights_come_when_called: Whether a module has weights only while it is called, as under ZeRO 3, so that no operator
            can take those of several.

    Returns:
        Whether there are any: False without a C++ compiler.
    """
    if library() is None:
        return False
    for module in model.modules():
        if type(module) in NATIVE and not (weights_come_when_called and isinstance(module, WITH_PARTS)):
            setattr(module, "native", NATIVE[type(module)])  # noqa: B010 - a name that nn.Module does not have
    return True
