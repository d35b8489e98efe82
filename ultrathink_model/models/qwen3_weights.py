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
        if not is_mixture(config, layer):
            yield from _swiglu_to_qwen3(
                f"{their}.mlp", state[f"{our}.feed_forward.gate_up.weight"], state[f"{our}.feed_forward.down.weight"]
            )


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
        if not is_mixture(config, layer):
            gate, up = weights[f"{their}.mlp.gate_proj.weight"], weights[f"{their}.mlp.up_proj.weight"]
            yield f"{our}.feed_forward.gate_up.weight", torch.cat((gate, up))
            yield f"{our}.feed_forward.down.weight", weights[f"{their}.mlp.down_proj.weight"]


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
