"""A mixture-of-experts layer of ours beside a dense one and `transformers`': `python benchmarks/mixture.py`.

Forward and backward pass of one layer in float32 (60 experts, the best 2, hidden 256, expert 128), over the time of a
dense SwiGLU of the same operations per token; then a whole training step of a model with experts over its dense twin's.
"""

import argparse
import os
import time
from statistics import median

import torch
from peers.ours import our_trainer
from peers.sizes import our_config
from peers.turns import Clock, Step, alternate, ratio
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from ultrathink_model.config import Config
from ultrathink_model.distributed.host_memory import keep_freed_memory
from ultrathink_model.models.attention import FeedForward
from ultrathink_model.models.moe import MixtureOfExperts
from ultrathink_model.models.native.kernels import use_native_kernels
from ultrathink_model.models.tokens import Tokens
from ultrathink_model.models.transformer import build_model

HIDDEN, EXPERTS, TOP_K, WIDTH = 256, 60, 2, 128
# 32 + 16 + 8 + 4 experts, as the config has it by itself.
LAYER = ("advanced.enable_moe=true", f"moe.expert_hidden_size={WIDTH}", f"model.intermediate_size={TOP_K * WIDTH}")


def our_layer(config: Config) -> nn.Module:
    """The first block's feed-forward, in training mode."""
    return build_model(config).blocks[0].feed_forward.train()


def dense_step(num_tokens: int) -> Step:
    """The dense layer of as many operations per token."""
    layer = our_layer(our_config(*LAYER, "advanced.enable_moe=false"))
    assert isinstance(layer, FeedForward)
    return forward_and_backward(layer, layer, num_tokens)


def our_step(num_tokens: int, native: bool) -> Step:
    """Our mixture, its auxiliary losses and counts included; as in training, or as it is without a compiler."""
    layer = our_layer(our_config(*LAYER))
    assert isinstance(layer, MixtureOfExperts)
    if native and not use_native_kernels(layer):
        raise SystemExit("native kernels need a C++ compiler")
    tokens = Tokens(torch.arange(num_tokens).unsqueeze(0))

    def run(x: torch.Tensor) -> torch.Tensor:
        mixed, routing = layer(x, tokens)
        return mixed + sum(routing.losses.values())

    return forward_and_backward(layer, run, num_tokens)


def their_step(implementation: str, num_tokens: int) -> Step:
    """`transformers`' mixture on our weights, without any auxiliary loss."""
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=WIDTH
    )
    config.norm_topk_prob = True
    config._experts_implementation = implementation
    layer, ours = Qwen3MoeSparseMoeBlock(config), our_layer(our_config(*LAYER))
    with torch.no_grad():
        layer.gate.weight.copy_(ours.router.weight)
        layer.experts.gate_up_proj.copy_(ours.gate_up)
        layer.experts.down_proj.copy_(ours.down)
    return forward_and_backward(layer, layer, num_tokens)


def forward_and_backward(layer: nn.Module, run: Step, num_tokens: int) -> Step:
    """A step that gives every weight and the input a gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, num_tokens, HIDDEN, generator=generator, requires_grad=True)
    direction = torch.randn(1, num_tokens, HIDDEN, generator=generator)

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        run(x).backward(direction)

    return step


def measure_layers(num_tokens: int, rounds: int, clock: Clock) -> None:
    """Prints the times of one layer over the dense one's."""
    steps = {
        "dense, equal operations": dense_step(num_tokens),
        "ultrathink": our_step(num_tokens, native=True),
        "ultrathink, without C++": our_step(num_tokens, native=False),
        "transformers, grouped": their_step("grouped_mm", num_tokens),
        "transformers, eager": their_step("eager", num_tokens),
    }
    seconds = alternate(steps, rounds, clock=clock)
    dense = next(iter(seconds.values()))
    for name, times in seconds.items():
        print(f"{num_tokens:6} tokens  {name:26} {1e3 * median(times):8.1f} ms {ratio(times, dense):7.2f}")


def measure_steps(rounds: int, clock: Clock) -> None:
    """Prints the times of whole training steps over those of the dense twin."""
    steps = {
        "dense": our_trainer(our_config(f"model.intermediate_size={TOP_K * WIDTH}")),
        "60 experts in every 2nd layer": our_trainer(our_config(*LAYER, "moe.layer_frequency=2")),
        "60 experts in every layer": our_trainer(our_config(*LAYER)),
    }
    seconds = alternate(steps, rounds, clock=clock)
    for name, times in seconds.items():
        print(f"whole step    {name:30} {1e3 * median(times):8.1f} ms {ratio(times, seconds['dense']):7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads of each product")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 16_384], help="tokens in a layer's batch")
    parser.add_argument("--no-steps", action="store_true", help="measure the layers only")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count processor time, of one thread: for a busy machine"
    )
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(1 if arguments.cpu_time else arguments.threads)
    keep_freed_memory()
    for num_tokens in arguments.tokens:
        measure_layers(num_tokens, arguments.rounds, clock)
    if not arguments.no_steps:
        measure_steps(arguments.rounds, clock)


if __name__ == "__main__":
    main()
