"""A whole model with native kernels against the same without."""

import pytest
import torch
from torch import nn

from ultrathink_model.models import transformer
from ultrathink_model.models.linear import Linear
from ultrathink_model.models.moe import MixtureOfExperts
from ultrathink_model.models.native import kernels
from ultrathink_model.models.native.kernels import NATIVE, use_native_kernels
from ultrathink_model.models.native.library import library
from ultrathink_model.models.norm import RMSNorm
from ultrathink_model.models.transformer import Transformer

needs_library = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")
FEATURES = {
    "dense": [],
    "experts": ["advanced.enable_moe=true", "moe.expert_capacity=1.0"],
    "reasoning engine": [
        "advanced.enable_dre=true",
        "dre.dense_layers=1",
        "dre.layer_frequency=1",
        "dre.compute_budget=0.5",
    ],
    "window": ["model.sliding_window=20"],
    "checkpointing": ["model.gradient_checkpointing=true"],
    "selective checkpointing": ["model.gradient_checkpointing=true", "model.gradient_checkpointing_mode=selective"],
    "tied, z-loss": ["model.tie_embeddings=true", "training.z_loss_weight=0.01"],
}


# Enough tokens for every operator: 5 rows of 64, heads of 16.
@needs_library
@pytest.mark.parametrize("overrides", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_model_computes_the_same(overrides, packed, small_model, random_tokens, monkeypatch):
    tokens, documents = random_tokens(5, 65), None
    if packed:
        documents = (torch.arange(64) // 23).expand(5, -1).contiguous()
    results, taken = [], set()
    for native in (False, True):
        model = small_model("model.head_dim=16", *overrides).train()
        model.begin_step(10_000)
        if native:
            assert use_native_kernels(model)
            watch(model, taken)
        output = model(tokens[:, :-1], tokens[:, 1:], document_ids=documents)
        (output.loss_sum + sum(output.aux_losses.values())).backward()
        results.append([output.loss_sum.detach(), *(parameter.grad for parameter in model.parameters())])
    expected = {type(module) for module in model.modules()} & NATIVE.keys()
    assert taken == expected, "an operator was passed over"
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max().clamp_min(1)))


def watch(model: nn.Module, taken: set[type]) -> None:
    """Notes the types of the modules whose native kernel gave a result."""
    for module in model.modules():
        if type(module) in NATIVE:
            module.native = noting(module.native, type(module), taken)


def noting(native, kind, taken):
    def call(*arguments):
        result = native(*arguments)
        if result is not None:
            taken.add(kind)
        return result

    return call


@needs_library
@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does so itself
@pytest.mark.parametrize("features", ["dense", "experts"])
def test_a_compiled_model_computes_the_same_without_a_break(features, small_model, random_tokens):
    tokens, losses, models = random_tokens(8, 65), [], []
    for compiles in (False, True):
        model = small_model("model.head_dim=16", *FEATURES[features]).train()
        use_native_kernels(model)
        torch.compiler.reset()
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model
        output = call(tokens[:, :-1], tokens[:, 1:])
        losses.append(output.loss_sum + sum(output.aux_losses.values()))
        losses[-1].backward()
        models.append(model)
    torch.testing.assert_close(losses[1], losses[0])
    for eager, compiled in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(compiled.grad, eager.grad, atol=1e-4, rtol=1e-4)


@needs_library
def test_evaluation_and_generation_compute_the_same(small_model, random_tokens):
    tokens = random_tokens(5, 64)
    plain, native = small_model("model.head_dim=16").eval(), small_model("model.head_dim=16").eval()
    use_native_kernels(native)
    with torch.no_grad():
        torch.testing.assert_close(native(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-5)


@needs_library
def test_plain_attention_is_left_as_asked(small_model, random_tokens):
    model, taken = small_model("model.head_dim=16", "model.use_flash_attention=false").train(), set()
    use_native_kernels(model)
    watch(model, taken)
    model(random_tokens(5, 64), random_tokens(5, 64, seed=1))
    assert type(model.blocks[0].attention) not in taken


@needs_library
def test_what_takes_the_weights_of_its_parts_is_left_alone_where_these_come_when_called(small_model):
    model = small_model()
    use_native_kernels(model, weights_come_when_called=True)
    native = {type(module) for module in model.modules() if type(module) in NATIVE and module.native is not None}
    assert native == {Linear, RMSNorm, Transformer}


def test_without_a_compiler_nothing_is_native(small_model, monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)
    model = small_model("advanced.enable_moe=true")
    assert not use_native_kernels(model)
    assert all(module.native is None for module in model.modules() if isinstance(module, (*NATIVE, MixtureOfExperts)))


def test_the_model_knows_nothing_of_them():
    # It is copied beside exported weights, where there is no C++.
    assert "native" not in (name.rpartition(".")[2] for name in vars(transformer))
