"""The decoder against `transformers`' own, its causality, and sums that do not depend on how a batch is cut."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ultrathink_model.config import Config
from ultrathink_model.models.hf_config import hugging_face_config
from ultrathink_model.models.qwen3_weights import from_qwen3
from ultrathink_model.models.transformer import Transformer, build_model

# Both sum the same float32 products in another order. Logits are of the order of 1, and a rounding error of 6e-8 a
# sum over a few hundred terms stays under 1e-5.
PARITY = {"atol": 1e-5, "rtol": 1e-5}

DENSE = {
    "multi-head": ["model.num_kv_heads=4"],
    "grouped-query": [],
    "one key head": ["model.num_kv_heads=1"],
    "wide heads": ["model.head_dim=16"],
    "untied": ["model.tie_embeddings=false"],
    "window": ["model.sliding_window=5"],
    "rope base": ["model.rope_theta=1000000.0", "model.norm_eps=1e-5"],
}
MIXTURES = {
    "top 2": ["advanced.enable_moe=true"],
    "top 1": ["advanced.enable_moe=true", "moe.moe_top_k=1"],
    "all": ["advanced.enable_moe=true", "moe.moe_top_k=8", "moe.expert_hidden_size=16"],
    "second block only": ["advanced.enable_moe=true", "moe.layer_frequency=2"],
    "odd width": ["advanced.enable_moe=true", "moe.expert_hidden_size=13"],
}
VARIANTS = DENSE | MIXTURES


def pair(config: Config) -> tuple[Transformer, torch.nn.Module]:
    """Our model and `transformers`', in evaluation mode, with one set of random weights."""
    settings = hugging_face_config(config)
    torch.manual_seed(0)
    if config.advanced.enable_moe:
        theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))
    else:
        theirs = Qwen3ForCausalLM(Qwen3Config(**settings))
    if config.advanced.enable_moe:
        theirs.set_experts_implementation("eager")  # their grouped products want widths of 16 bytes
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1)
    ours = build_model(config)
    missing, unexpected = ours.load_state_dict(dict(from_qwen3(theirs.state_dict(), config)), strict=False)
    assert not unexpected
    assert all(name.endswith("expert_load") for name in missing)
    return ours.eval(), theirs.eval()


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def models(request, small_config) -> tuple[Transformer, torch.nn.Module]:
    return pair(small_config(*request.param))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7, 32, 64])
def test_logits_equal_transformers(models, random_tokens, length):
    ours, theirs = models
    tokens = random_tokens(3, length)
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, **PARITY)


@torch.no_grad()
def test_logits_equal_transformers_under_left_padding(models, random_tokens):
    ours, theirs = models
    tokens = random_tokens(3, 16)
    mask = torch.arange(16) >= torch.tensor([[0], [4], [15]])
    expected = theirs(tokens, attention_mask=mask.long()).logits
    torch.testing.assert_close(ours(tokens, attention_mask=mask).logits[mask], expected[mask], **PARITY)


@torch.no_grad()
def test_packed_documents_equal_documents_alone(models, random_tokens):
    ours, theirs = models
    lengths = (5, 1, 14, 12)
    parts = [random_tokens(1, length, seed=length) for length in lengths]
    document_ids = torch.repeat_interleave(torch.arange(4, dtype=torch.int32), torch.tensor(lengths)).unsqueeze(0)
    packed = ours(torch.cat(parts, dim=1), document_ids=document_ids).logits
    alone = torch.cat([theirs(part).logits for part in parts], dim=1)
    torch.testing.assert_close(packed, alone, **PARITY)


def test_gradients_equal_transformers(models, random_tokens):
    ours, theirs = models
    tokens = random_tokens(2, 17)
    ours(tokens[:, :-1], tokens[:, 1:]).loss_sum.backward()
    logits = theirs(tokens[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    if ours.head is None:
        gradients["lm_head.weight"] = gradients["model.embed_tokens.weight"]
    expected = dict(from_qwen3(gradients, ours.config))
    assert set(expected) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        # Gradients here are of the order of 10 (a sum over 32 tokens), so the bound is relative to the largest.
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5 * max(scale, 1), rtol=0, msg=name)
