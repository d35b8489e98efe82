"""How much of what the device could do at its best a run makes use of (MFU)."""

import time
from dataclasses import dataclass

import torch

from ultrathink_model.config import Config
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.models.transformer import is_mixture, is_routed

# Dense 16-bit matrix products in FLOP/s, from the makers' data sheets; the first name that the device's holds counts.
PEAKS_16_BIT = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
    "4090": 165e12,
    "3090": 71e12,
}
MEASURED_SIZES = {"cpu": 512, "cuda": 4096}
MEASURED_ROUNDS = 8


@dataclass(frozen=True)
class Throughput:
    """What a run costs and what its devices could do.

    Attributes:
        flops_per_token: Floating point operations of one training token, forward and backward.
        peak: FLOP/s of all devices together.
    """

    flops_per_token: float
    peak: float

    @classmethod
    def of(cls, config: Config, context: RankContext) -> "Throughput":
        """The run's own; the peak is from the table for a GPU in 16 bits, and measured otherwise."""
        return cls(flops_per_token(config), device_peak(config, context.device) * context.world_size)

    def utilisation(self, tokens_per_second: float) -> float:
        """The share of the peak that this many tokens per second over all ranks need, from 0 to 1."""
        return tokens_per_second * self.flops_per_token / self.peak


def flops_per_token(config: Config) -> float:
    """6 for each weight that a token meets in a matrix product, and the causal attention's products.

    After Chowdhery et al. 2022 (appendix B, https://arxiv.org/abs/2204.02311), but half of their attention: of the
    positions that a token could look at, causality leaves half on average. Recomputation counts as no use. Blocks that
    are routed in depth count as many passes as `dre.compute_budget` says.
    """
    model, moe = config.model, config.moe
    inner = model.num_heads * model.head_size
    attention = model.hidden_size * (2 * inner + 2 * model.kv_heads * model.head_size)
    seen = min(model.max_seq_length / 2, model.sliding_window or model.max_seq_length)
    total = 1.0 * model.vocab_size * model.hidden_size
    for layer in range(model.num_layers):
        if is_mixture(config, layer):
            width = moe.expert_hidden_size or model.feed_forward_size // moe.moe_top_k
            block = 3 * model.hidden_size * width * moe.moe_top_k + model.hidden_size * moe.num_experts
        else:
            block = 3 * model.hidden_size * model.feed_forward_size
        passes = config.dre.compute_budget if is_routed(config, layer) else 1.0
        total += passes * (attention + block + 2 * seen * inner)
    return 6.0 * total


def device_peak(config: Config, device: torch.device) -> float:
    """FLOP/s of one device in the run's number format."""
    dtype = torch.float32
    if config.training.use_amp:
        dtype = torch.bfloat16 if config.training.amp_dtype == "bf16" else torch.float16
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS_16_BIT.items():
            if known in name:
                return peak
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
