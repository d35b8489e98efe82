"""The weights under the names and in the shapes of `transformers`' Qwen3 and Qwen3-MoE, and back."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ultrathink_model.config import Config
from ultrathink_model.models.transformer import is_mixture

# Ours to theirs, for weights that have one name in each.
WHOLE_MODEL = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
}
EACH_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
}
QUERY_KEY_VALUE = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")


def to_qwen3(state: Mapping[str, Tensor], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Each weight of our `state` as Qwen3 names it; fused ones come apart, none is copied."""
    for ours, theirs in _names(config):
        yield theirs, state[ours]
    for layer in range(config.model.num_layers):
        our, their = f"blocks.{layer}", f"model.layers.{layer}"
        qkv = state[f"{our}.attention.qkv.weight"].split(_qkv_rows(config))
        yield from zip((f"{their}.{name}" for name in QUERY_KEY_VALUE), qkv, strict=True)
        if is_mixture(config, layer):
            yield from _mixture_to_qwen3(f"{their}.mlp", state, f"{our}.feed_forward")
        else:
            gate_up, down = state[f"{our}.feed_forward.gate_up.weight"], state[f"{our}.feed_forward.down.weight"]
            yield from _swiglu_to_qwen3(f"{their}.mlp", gate_up, down)


def from_qwen3(weights: Mapping[str, Tensor], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Each weight as our model names it, from weights under Qwen3's names.

    Raises:
        KeyError: A weight is missing.
    """
    for ours, theirs in _names(config):
        yield ours, weights[theirs]
    for layer in range(config.model.num_layers):
        our, their = f"blocks.{layer}", f"model.layers.{layer}"
        yield f"{our}.attention.qkv.weight", torch.cat([weights[f"{their}.{name}"] for name in QUERY_KEY_VALUE])
        if is_mixture(config, layer):
            yield from _mixture_from_qwen3(f"{our}.feed_forward", weights, f"{their}.mlp", config.moe.num_experts)
        else:
            gate_up, down = _swiglu_from_qwen3(weights, f"{their}.mlp")
            yield f"{our}.feed_forward.gate_up.weight", gate_up
            yield f"{our}.feed_forward.down.weight", down


def _names(config: Config) -> Iterator[tuple[str, str]]:
    yield from WHOLE_MODEL.items()
    if not config.model.tie_embeddings:
        yield "head.weight", "lm_head.weight"
    for layer in range(config.model.num_layers):
        for ours, theirs in EACH_BLOCK.items():
            yield f"blocks.{layer}.{ours}", f"model.layers.{layer}.{theirs}"


def _qkv_rows(config: Config) -> list[int]:
    model = config.model
    return [heads * model.head_size for heads in (model.num_heads, model.kv_heads, model.kv_heads)]


def _swiglu_to_qwen3(prefix: str, gate_up: Tensor, down: Tensor) -> Iterator[tuple[str, Tensor]]:
    gate, up = gate_up.chunk(2)
    yield f"{prefix}.gate_proj.weight", gate
    yield f"{prefix}.up_proj.weight", up
    yield f"{prefix}.down_proj.weight", down


def _swiglu_from_qwen3(weights: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    gate, up, down = (weights[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return torch.cat((gate, up)), down


def _mixture_to_qwen3(prefix: str, state: Mapping[str, Tensor], ours: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}.gate.weight", state[f"{ours}.router.weight"]
    for expert, (gate_up, down) in enumerate(zip(state[f"{ours}.gate_up"], state[f"{ours}.down"], strict=True)):
        yield from _swiglu_to_qwen3(f"{prefix}.experts.{expert}", gate_up, down)


def _mixture_from_qwen3(
    ours: str, weights: Mapping[str, Tensor], prefix: str, num_experts: int
) -> Iterator[tuple[str, Tensor]]:
    yield f"{ours}.router.weight", weights[f"{prefix}.gate.weight"]
    if f"{prefix}.experts.gate_up_proj" in weights:  # as `transformers` 5 holds them in memory
        yield f"{ours}.gate_up", weights[f"{prefix}.experts.gate_up_proj"]
        yield f"{ours}.down", weights[f"{prefix}.experts.down_proj"]
        return
    experts = [_swiglu_from_qwen3(weights, f"{prefix}.experts.{expert}") for expert in range(num_experts)]
    gate_up, down = (torch.stack(parts) for parts in zip(*experts, strict=True))
    yield f"{ours}.gate_up", gate_up
    yield f"{ours}.down", down
