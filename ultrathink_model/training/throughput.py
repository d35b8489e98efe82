"""How much of what the device could do at its best a run makes use of (MFU)."""

import time
from dataclasses import dataclass

import torch

from ultrathink_model.config import Config
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.planning.compute import TRAINING_PASSES, forward_flops_per_token
from ultrathink_model.planning.hardware import device_of_driver

MEASURED_SIZES = {"cpu": 512, "cuda": 4096}
MEASURED_ROUNDS = 8


@dataclass(frozen=True)
class Throughput:
    """What a run costs and what its devices could do.

    Attributes:
        flops_per_token: Floating point operations of one training token, forward and backward; what gradient
            checkpointing computes again counts as no use.
        peak: FLOP/s of all devices together.
    """

    flops_per_token: float
    peak: float

    @classmethod
    def of(cls, config: Config, context: RankContext) -> "Throughput":
        """The run's own; the peak is from the table for a GPU in 16 bits, and measured otherwise."""
        return cls(
            TRAINING_PASSES * forward_flops_per_token(config), device_peak(config, context.device) * context.world_size
        )

    def utilisation(self, tokens_per_second: float) -> float:
        """The share of the peak that this many tokens per second over all ranks need, from 0 to 1."""
        return tokens_per_second * self.flops_per_token / self.peak


def device_peak(config: Config, device: torch.device) -> float:
    """FLOP/s of one device in the run's number format."""
    dtype = torch.float32
    if config.training.use_amp:
        dtype = torch.bfloat16 if config.training.amp_dtype == "bf16" else torch.float16
    if device.type == "cuda" and dtype != torch.float32:
        known = device_of_driver(torch.cuda.get_device_name(device))
        if known is not None:
            return known.tflops * 1e12
    return measured_peak(device, dtype)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products, the best of a few; it takes some hundredths of a second."""
    size = MEASURED_SIZES.get(device.type, 1024)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(MEASURED_ROUNDS):
        _synchronise(device)
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        _synchronise(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
