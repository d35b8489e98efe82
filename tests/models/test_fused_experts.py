"""The fused feed-forward of experts against the operators it stands for, whose gradients are checked elsewhere."""

import ctypes
import functools
import logging

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ultrathink_model.models import fused_experts
from ultrathink_model.models.dispatch import Dispatch, sum_copies, take_copies, take_weights
from ultrathink_model.models.fused_experts import find_compiler, fuse_experts, mix_experts
from ultrathink_model.models.mkl import mkl_function
from ultrathink_model.models.moe import apply_experts
from ultrathink_model.models.recomputation import KEPT
from ultrathink_model.models.transformer import build_model

EXPERTS, TOP_K, HIDDEN, WIDTH = 6, 2, 24, 20

needs_library = pytest.mark.skipif(
    find_compiler() is None or mkl_function("sgemm_") is None, reason="needs a C++ compiler and a PyTorch with MKL"
)


def plain(rows, weights, dispatch, gate_up, down):
    """What is fused, one operator after another."""
    scale = take_weights(weights, dispatch)
    taken = torch.arange(scale.shape[0]).unsqueeze(1) < dispatch.ends[-1]
    copies = take_copies(rows, dispatch).where(taken, 0.0)
    mixed = apply_experts(copies, scale.where(taken, 0.0), dispatch.ends, gate_up, down)
    return sum_copies(mixed.where(taken, 0.0), dispatch)


def draw(tokens: int, spread: float = 1.0) -> tuple[list[torch.Tensor], Dispatch]:
    """Operands, and a dispatch with an expert that takes none, one that takes most, and copies of no expert."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(tokens, EXPERTS, generator=generator) + torch.tensor([4.0, 0, 0, -torch.inf, 0, 0])
    experts = scores.topk(TOP_K).indices
    experts[::5] = EXPERTS
    shapes = [(tokens, HIDDEN), (tokens, TOP_K), (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)]
    operands = [torch.randn(shape, generator=generator) for shape in shapes]
    operands[2] *= spread
    return operands, Dispatch.sort(experts, EXPERTS)


def with_gradients(function, operands, dispatch, direction):
    """The result, and the gradients of all operands."""
    operands = [operand.clone().requires_grad_() for operand in operands]
    mixed = function(*operands[:2], dispatch, *operands[2:])
    mixed.backward(direction.to(mixed.dtype))
    return [mixed.detach(), *(operand.grad for operand in operands)]


# Of 750 tokens the first expert takes two blocks and a part of one; the gates at 50 leave exp's range.
@needs_library
@pytest.mark.parametrize(("tokens", "spread"), [(13, 1.0), (750, 1.0), (40, 50.0)])
def test_results_and_gradients_are_those_of_the_operators_in_float64(tokens, spread):
    operands, dispatch = draw(tokens, spread)
    direction = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1))
    fused = with_gradients(mix_experts, operands, dispatch, direction)
    exact = with_gradients(plain, [operand.double() for operand in operands], dispatch, direction)
    assert dispatch.ends.diff(prepend=torch.zeros(1)).min() == 0
    assert dispatch.ends[-1] < tokens * TOP_K
    for ours, reference in zip(fused, exact, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=2e-6 * float(reference.abs().max()))


@needs_library
@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore")  # torch's compiler trips over its own deprecations
def test_operator_is_what_pytorch_asks_of_one():
    (rows, weights, gate_up, down), _ = draw(13)
    # Copies of no expert would have undefined products.
    dispatch = Dispatch.sort(torch.arange(13 * TOP_K).view(13, TOP_K) % EXPERTS, EXPERTS)
    operands = (rows, weights, dispatch.slots, dispatch.places, dispatch.ends, gate_up, down)
    torch.library.opcheck(fused_experts._fused_experts, [x.requires_grad_(x.is_floating_point()) for x in operands])


@needs_library
def test_it_is_repeatable_over_threads():
    operands, dispatch = draw(300)
    direction = torch.ones(300, HIDDEN)
    first, second = (with_gradients(mix_experts, operands, dispatch, direction) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@needs_library
def test_operations_are_counted_as_those_of_the_operators():
    operands, dispatch = draw(13)
    direction = torch.ones(13, HIDDEN)
    counts = []
    for function in (mix_experts, plain):
        with FlopCounterMode(display=False) as counter:
            with_gradients(function, operands, dispatch, direction)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 13 * TOP_K * 3 * WIDTH * HIDDEN


def test_other_formats_and_few_experts_are_left_to_the_operators(monkeypatch):
    (rows, weights, gate_up, down), dispatch = draw(13)
    assert mix_experts(rows.bfloat16(), weights.bfloat16(), dispatch, gate_up.bfloat16(), down.bfloat16()) is None
    assert mix_experts(rows.double(), weights.double(), dispatch, gate_up.double(), down.double()) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: EXPERTS + 1)
    assert mix_experts(rows, weights, dispatch, gate_up, down) is None


@needs_library
def test_a_model_computes_the_same_with_fused_experts(small_model, random_tokens):
    overrides = ["advanced.enable_moe=true", "moe.expert_capacity=1.0"]
    tokens, results = random_tokens(2, 9), []
    for fuse in (False, True):
        model = small_model(*overrides).train()
        assert fuse_experts(model) if fuse else True
        output = model(tokens[:, :-1], tokens[:, 1:])
        (output.loss_sum + sum(output.aux_losses.values())).backward()
        results.append([output.loss_sum.detach(), *(parameter.grad for parameter in model.parameters())])
    for plain_part, fused_part in zip(*results, strict=True):
        torch.testing.assert_close(fused_part, plain_part, rtol=1e-4, atol=1e-5 * float(plain_part.abs().max()))


def test_selective_recomputation_keeps_their_products():
    assert torch.ops.ultrathink.fused_experts.default in KEPT


def test_without_a_compiler_nothing_is_fused(small_config, monkeypatch):
    monkeypatch.setattr(fused_experts, "find_compiler", lambda: None)
    monkeypatch.setattr(fused_experts, "_library", functools.cache(fused_experts._library.__wrapped__))
    assert not fuse_experts(build_model(small_config("advanced.enable_moe=true")))


@needs_library
def test_what_the_compiler_says_is_logged(small_config, monkeypatch, tmp_path, caplog):
    broken = tmp_path / "broken.cpp"
    broken.write_text("not C++")
    monkeypatch.setattr(fused_experts, "SOURCE", broken)
    monkeypatch.setattr(fused_experts, "_library", functools.cache(fused_experts._library.__wrapped__))
    with caplog.at_level(logging.WARNING):
        assert not fuse_experts(build_model(small_config("advanced.enable_moe=true")))
    assert "could not compile" in caplog.text
    assert "error" in caplog.text


@needs_library
def test_a_folder_that_no_code_may_run_from_is_no_failure(monkeypatch, caplog):
    def refuse(path):
        raise OSError(f"{path}: failed to map segment from shared object")

    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda path: refuse(path) if "fused_experts" in path else real(path))
    with caplog.at_level(logging.WARNING):
        assert fused_experts._library.__wrapped__() is None
    assert "experts are not fused" in caplog.text
