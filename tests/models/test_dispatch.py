"""Sorting by expert and grouped products: against plain loops, and their gradients by finite differences."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from ultrathink_model.models import mkl
from ultrathink_model.models.dispatch import Dispatch, grouped_linear, sum_copies, take_copies, take_weights

EXPERTS, TOP_K, TOKENS = 5, 2, 13


def random_choice() -> torch.Tensor:
    """Two experts of five for each token; expert 3 is never chosen."""
    scores = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))
    scores[:, 3] = -torch.inf
    return scores.topk(TOP_K).indices


def loop(rows: torch.Tensor, weight: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
    """The grouped product as a loop over experts."""
    starts = [0, *dispatch.ends.tolist()]
    return torch.cat([rows[starts[e] : starts[e + 1]] @ weight[e].T for e in range(EXPERTS)])


def test_copies_are_sorted_by_expert_and_earlier_tokens_come_first():
    chosen = random_choice()
    dispatch = Dispatch.sort(chosen, EXPERTS)
    pairs = [
        (int(chosen.flatten()[slot]), int(token)) for slot, token in zip(dispatch.slots, dispatch.tokens, strict=True)
    ]
    assert pairs == sorted(pairs)
    assert dispatch.ends.tolist() == chosen.flatten().bincount(minlength=EXPERTS).cumsum(0).tolist()
    assert (dispatch.slots[dispatch.places] == torch.arange(TOKENS * TOP_K).view(TOKENS, TOP_K)).all()


def test_copies_of_no_expert_stand_last():
    chosen = random_choice()
    chosen[4] = EXPERTS
    dispatch = Dispatch.sort(chosen, EXPERTS)
    assert dispatch.ends[-1] == (TOKENS - 1) * TOP_K
    assert dispatch.tokens[-TOP_K:].tolist() == [4, 4]


def test_copies_and_weights_meet_and_are_summed():
    chosen = random_choice()
    dispatch = Dispatch.sort(chosen, EXPERTS)
    x, weights = torch.randn(TOKENS, 6), torch.rand(TOKENS, TOP_K)
    scaled = take_copies(x, dispatch) * take_weights(weights, dispatch)
    torch.testing.assert_close(sum_copies(scaled, dispatch), x * weights.sum(dim=1, keepdim=True))


def test_gradients_equal_finite_differences():
    dispatch = Dispatch.sort(random_choice(), EXPERTS)
    torch.manual_seed(0)
    x = torch.randn(TOKENS, 6, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(TOKENS * TOP_K, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(TOKENS, TOP_K, dtype=torch.float64, requires_grad=True)
    matrices = torch.randn(EXPERTS, 3, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: take_copies(x, dispatch), (x,))
    assert gradcheck(lambda rows: sum_copies(rows, dispatch), (rows,))
    assert gradcheck(lambda weights: take_weights(weights, dispatch), (weights,))
    assert gradcheck(lambda rows, matrices: grouped_linear(rows, matrices, dispatch.ends), (rows, matrices))


@pytest.fixture(params=["MKL", "PyTorch"])
def _library(request, monkeypatch):
    """MKL in one call, where this PyTorch has it; else, and for other formats than float32, PyTorch's own."""
    monkeypatch.setattr(mkl, "FEWEST_ROWS", 0)
    if request.param == "PyTorch":
        monkeypatch.setattr(mkl, "_batched_product", lambda: None)
    elif not torch.backends.mkl.is_available():
        pytest.skip("this PyTorch has no MKL")


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this PyTorch has no MKL")
def test_small_products_go_to_mkl_in_one_call():
    ends = torch.tensor([60, mkl.FEWEST_ROWS], dtype=torch.int32)
    rows, weight = torch.ones(mkl.FEWEST_ROWS, 4), torch.ones(2, 3, 4)
    assert mkl.mkl_is_faster(rows, weight, ends)
    assert not mkl.mkl_is_faster(rows[:-1], weight, ends)
    assert not mkl.mkl_is_faster(torch.ones(2 * mkl.LARGE_GROUP, 4), weight, ends)
    assert not mkl.mkl_is_faster(rows.double(), weight.double(), ends)
    assert not mkl.mkl_is_faster(rows[:, :0], weight[:, :, :0], ends)


# The widths of the first are what the grouped kernels take; those of the second are not multiples of 16 bytes.
@pytest.mark.parametrize(("inner", "outer"), [(16, 24), (7, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.usefixtures("_library")
def test_grouped_product_equals_a_loop_over_experts(inner, outer, dtype):
    dispatch = Dispatch.sort(random_choice(), EXPERTS)
    torch.manual_seed(0)
    operands = [torch.randn(TOKENS * TOP_K, inner), torch.randn(EXPERTS, outer, inner)]
    ours = [operand.to(dtype).requires_grad_() for operand in operands]
    plain = [operand.detach().clone().requires_grad_() for operand in ours]
    result, expected = grouped_linear(*ours, dispatch.ends), loop(*plain, dispatch)
    # One rounding to the result's format apart: sums of up to 26 products of the order of 1.
    bound = 8 * torch.finfo(dtype).eps * inner**0.5
    torch.testing.assert_close(result, expected, atol=bound, rtol=bound)
    direction = torch.randn_like(expected)
    result.backward(direction)
    expected.backward(direction)
    for ours_part, plain_part in zip(ours, plain, strict=True):
        torch.testing.assert_close(ours_part.grad, plain_part.grad, atol=4 * bound, rtol=4 * bound)


@pytest.mark.usefixtures("_library")
def test_expanded_and_transposed_operands_are_taken():
    dispatch = Dispatch.sort(random_choice(), EXPERTS)
    rows = torch.ones(8, TOKENS * TOP_K).T.requires_grad_()
    weight = torch.ones(EXPERTS, 8, 4).mT
    product = grouped_linear(rows, weight, dispatch.ends)
    assert (product == 8).all()
    product.sum().backward()  # its gradient is one number, expanded
    assert (rows.grad == 4).all()


@pytest.mark.usefixtures("_library")
def test_an_expert_that_no_token_chose_gets_a_gradient_of_zero():
    dispatch = Dispatch.sort(random_choice(), EXPERTS)
    weight = torch.ones(EXPERTS, 8, 8, requires_grad=True)
    grouped_linear(torch.ones(TOKENS * TOP_K, 8), weight, dispatch.ends).sum().backward()
    assert weight.grad[3].abs().max() == 0
    assert weight.grad[[0, 1, 2, 4]].abs().amin() > 0


def test_flop_counter_sees_grouped_products():
    dispatch = Dispatch.sort(random_choice(), EXPERTS)
    rows = torch.ones(TOKENS * TOP_K, 8, requires_grad=True)
    weight = torch.ones(EXPERTS, 4, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        grouped_linear(rows, weight, dispatch.ends).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * TOKENS * TOP_K * 4 * 8
