"""The fused feed-forward of experts against the operators it stands for, whose gradients are checked elsewhere."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ultrathink_model.models.dispatch import Dispatch, sum_copies, take_copies, take_weights
from ultrathink_model.models.moe import apply_experts
from ultrathink_model.models.native import experts as module
from ultrathink_model.models.native.experts import mix_experts
from ultrathink_model.models.recomputation import KEPT

EXPERTS, TOP_K, HIDDEN, WIDTH = 6, 2, 24, 20
pytestmark = pytest.mark.usefixtures("build")


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


def test_operators_keep_the_rules_that_compilation_relies_on():
    (rows, weights, gate_up, down), _ = draw(13)
    # Copies of no expert would have undefined products.
    dispatch = Dispatch.sort(torch.arange(13 * TOP_K).view(13, TOP_K) % EXPERTS, EXPERTS)
    operands = (rows, weights, dispatch.slots, dispatch.places, dispatch.ends, gate_up, down)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(module.EXPERTS, operands, test_utils=checks)
    mixed, inner = module.EXPERTS(*operands)
    torch.library.opcheck(module.EXPERTS_GRAD, (mixed, *operands, inner), test_utils=checks)


def test_it_is_repeatable_over_threads():
    operands, dispatch = draw(300)
    direction = torch.ones(300, HIDDEN)
    first, second = (with_gradients(mix_experts, operands, dispatch, direction) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


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


def test_selective_recomputation_keeps_their_products():
    assert module.EXPERTS in KEPT
