"""Mixture of experts."""

import torch
from torch import Tensor, nn

from ultrathink_model.config import Config
from ultrathink_model.models.routing import Routing
from ultrathink_model.models.tokens import Tokens


class MixtureOfExperts(nn.Module):
    def __init__(self, config: Config) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Routing]: ...
    def initialise(self, generator: torch.Generator, spread: float, residual_spread: float) -> None: ...
    def end_step(self, counts: dict[str, Tensor]) -> None: ...
    @staticmethod
    def statistics(layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {}
