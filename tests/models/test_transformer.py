"""The decoder against `transformers`' own, its causality, and sums that do not depend on how a batch is cut."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ultrathink_model.config import Config
from ultrathink_model.models.hf_config import hugging_face_config
from ultrathink_model.models.moe import MixtureOfExperts
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


FEATURES = {
    "dense": [],
    "mixture": ["advanced.enable_moe=true"],
    "depth": ["advanced.enable_dre=true", "dre.layer_frequency=1"],
    "both": ["advanced.enable_moe=true", "advanced.enable_dre=true", "dre.layer_frequency=2"],
}
FEATURE_PARAMETERS = pytest.mark.parametrize("overrides", FEATURES.values(), ids=FEATURES.keys())


@torch.no_grad()
def with_routers_spread_out(model: Transformer) -> Transformer:
    """Gives depth routers weights and thresholds as training would: about a third of the tokens on the fast path."""
    generator = torch.Generator().manual_seed(7)
    for block in model.blocks:
        router = block.depth_router
        if router is not None:
            router.router.weight.normal_(0.0, 0.2, generator=generator)
            router.strengths.fill_(0.6)
            router.thresholds.copy_(torch.tensor([-0.4, 0.6, 1.2]))
    return model


@torch.no_grad()
@FEATURE_PARAMETERS
@pytest.mark.parametrize("shape", ["plain", "window", "packed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16 autocast", "fp16 autocast"])
def test_no_logit_depends_on_a_later_token(small_model, random_tokens, overrides, shape, precision):
    window = ["model.sliding_window=6"] if shape == "window" else []
    model = with_routers_spread_out(small_model(*overrides, *window)).eval()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision[:4], torch.float32)
    autocast = precision.endswith("autocast")
    if not autocast:
        model.to(dtype)
    tokens = random_tokens(2, 24)
    documents = torch.arange(24).div(13, rounding_mode="floor").expand(2, -1) if shape == "packed" else None
    with torch.autocast("cpu", dtype if autocast else torch.bfloat16, enabled=autocast):
        before = model(tokens, document_ids=documents).logits.float()
        for changed in (5, 13, 23):
            other = tokens.clone()
            other[:, changed] = (other[:, changed] + 41) % 96
            after = model(other, document_ids=documents).logits.float()
            # Nothing but the number of rows of the experts' and routed products may differ, which changes the order
            # in which they are summed: a few roundings of logits of the order of 10.
            bound = 0.0 if not overrides else 40 * torch.finfo(dtype).eps
            torch.testing.assert_close(after[:, :changed], before[:, :changed], atol=bound, rtol=bound)
            assert (after[:, changed] - before[:, changed]).abs().max() > 0.3, "the change is felt where it may be"
            if documents is not None and changed < 13:
                torch.testing.assert_close(after[:, 13:], before[:, 13:], atol=bound, rtol=bound)


def totals(model: Transformer, parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Losses, gradients, statistics and state after one optimizer step over micro-batches of tokens and groups."""
    model.begin_step(3)
    sums: dict[str, Tensor] = {}
    for tokens, groups in parts:
        output = model(tokens[:, :-1], tokens[:, 1:], source_groups=groups)
        losses = {"loss": output.loss_sum, **output.aux_losses}
        sum(losses.values()).backward()
        sums = {name: sums.get(name, 0) + loss.detach() for name, loss in losses.items()}
    model.end_step(lambda counts: counts)
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return sums | gradients | model.routing_statistics() | dict(model.named_buffers())


@FEATURE_PARAMETERS
def test_a_step_is_the_same_however_its_batch_is_cut(small_model, random_tokens, overrides):
    options = ["training.z_loss_weight=0.01", "training.loss_chunk_size=20", "advanced.dre_warmup_steps=6"]
    tokens, groups = random_tokens(5, 33), random_tokens(5, 32, seed=1) % 5 - 1
    cuts = [[slice(0, 5)], [slice(0, 2), slice(2, 3), slice(3, 5)]]
    results = []
    for cut in cuts:
        model = with_routers_spread_out(small_model(*overrides, *options))
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                module.end_step({"moe/load": torch.arange(8.0)})
        results.append(totals(model, [(tokens[rows], groups[rows]) for rows in cut]))
    whole, parts = results
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        # Sums of 160 tokens in another order, of gradients of the order of 100.
        torch.testing.assert_close(
            parts[name], value, atol=2e-4, rtol=1e-4, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )


@FEATURE_PARAMETERS
def test_checkpointing_changes_no_gradient(small_model, random_tokens, overrides):
    tokens = random_tokens(3, 33)
    results = []
    for checkpointing in ("false", "true"):
        options = [f"model.gradient_checkpointing={checkpointing}", "moe.router_jitter=0.2"]
        model = with_routers_spread_out(small_model(*overrides, *options))
        torch.manual_seed(0)
        results.append(totals(model, [(tokens, tokens[:, 1:] % 4)]))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5, equal_nan=True)


def test_step_has_no_statistics_before_it_ends(small_model, random_tokens):
    model, tokens = small_model(*FEATURES["both"]), random_tokens(2, 17)
    loads = [name for name in model.state_dict() if name.endswith("expert_load")]
    before = {name: model.state_dict()[name].clone() for name in loads}
    model(tokens[:, :-1], tokens[:, 1:])
    assert model.routing_statistics() == {}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in loads)
    model.end_step(lambda counts: 2 * counts)  # as if another rank had counted the same
    statistics = model.routing_statistics()
    assert statistics.keys() == {
        "moe/load", "moe/entropy", "moe/dropped", "moe/group_share", "dre/paths", "dre/compute"
    }  # fmt: skip
    assert statistics["moe/load"].shape == (2, 8)
    assert statistics["dre/paths"].shape == (1, 4)
    assert all(not torch.equal(model.state_dict()[name], before[name]) for name in loads)
    model.eval()(tokens)
    model.end_step(lambda counts: counts)
    torch.testing.assert_close(model.routing_statistics(), statistics, equal_nan=True)


def test_ranks_sum_every_count_in_one_reduction(small_model, random_tokens):
    model, tokens = small_model(*FEATURES["both"]), random_tokens(2, 17)
    model(tokens[:, :-1], tokens[:, 1:])
    calls = []
    model.end_step(lambda counts: calls.append(counts.shape) or counts)
    assert len(calls) == 1


def test_dense_model_has_no_counts_to_reduce(small_model, random_tokens):
    model, tokens = small_model(), random_tokens(2, 17)
    model(tokens[:, :-1], tokens[:, 1:])
    model.end_step(lambda _: pytest.fail("nothing to reduce"))
    assert model.routing_statistics() == {}


def test_weights_depend_on_the_seed_and_not_on_the_features(small_config):
    dense = build_model(small_config()).state_dict()
    full = build_model(small_config(*FEATURES["both"])).state_dict()
    shared = dense.keys() & full.keys()
    assert "blocks.1.attention.qkv.weight" in shared
    assert all(torch.equal(dense[name], full[name]) for name in shared)
    assert all(torch.equal(part, dense[name]) for name, part in build_model(small_config()).state_dict().items())
    other = build_model(small_config("training.seed=7")).state_dict()
    assert not torch.equal(other["embedding.weight"], dense["embedding.weight"])


def test_initial_spread_is_the_configs(small_config):
    model = build_model(small_config("model.hidden_size=128", *FEATURES["both"]))
    router = model.blocks[1].depth_router
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].feed_forward.gate_up.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].feed_forward.router.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for name in ("attention.output.weight", "feed_forward.down"):
        assert model.blocks[0].get_parameter(name).std().item() == pytest.approx(0.01, rel=0.05)
    assert router.router.weight.abs().max() == 0
    assert (model.norm.weight == 1).all()


@torch.no_grad()
def test_loss_is_the_cross_entropy_of_the_logits(small_model, random_tokens):
    model, tokens = small_model().eval(), random_tokens(3, 33)
    labels = tokens[:, 1:].clone()
    labels[0, :9] = -100
    expected = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    output = model(tokens[:, :-1], labels)
    torch.testing.assert_close(output.loss_sum, expected)
    assert output.logits is None
    assert output.aux_losses == {}
    assert model(tokens, return_logits=False).logits is None


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does so itself
@FEATURE_PARAMETERS
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_compiled_model_equals_the_eager_one_without_a_break(small_model, random_tokens, overrides, checkpointing):
    tokens = random_tokens(2, 33)
    options = [f"model.gradient_checkpointing={checkpointing}", "advanced.dre_warmup_steps=2"]
    eager, plain = (with_routers_spread_out(small_model(*overrides, *options)) for _ in range(2))
    torch.compiler.reset()
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for step in range(3):
        losses = []
        for model, call in ((eager, eager), (plain, compiled)):
            model.zero_grad()
            model.begin_step(step)
            output = call(tokens[:, :-1], tokens[:, 1:])
            losses.append(output.loss_sum + sum(output.aux_losses.values()))
            losses[-1].backward()
            model.end_step(lambda counts: counts)
        torch.testing.assert_close(losses[1], losses[0])
        for ours, other in zip(plain.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, other.grad, atol=1e-4, rtol=1e-4)
