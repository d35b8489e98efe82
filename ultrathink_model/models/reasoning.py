"""Dynamic Reasoning Engine."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ultrathink_model.config import Config
from ultrathink_model.models.attention import LayerCache
from ultrathink_model.models.routing import Routing
from ultrathink_model.models.tokens import Rotation, Tokens

Residual = Callable[[Tensor, Tokens, Rotation, LayerCache | None], tuple[Tensor, Routing]]


class DepthRouter(nn.Module):
    def __init__(self, config: Config) -> None:
        raise NotImplementedError

    def forward(
        self, residual: Residual, x: Tensor, tokens: Tokens, rotation: Rotation, cache: LayerCache | None
    ) -> tuple[Tensor, Routing]: ...
    def initialise(self, generator: torch.Generator, spread: float, residual_spread: float) -> None: ...
    def begin_step(self, step: int) -> None: ...
    def end_step(self, counts: dict[str, Tensor]) -> None: ...
    @staticmethod
    def statistics(layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {}
