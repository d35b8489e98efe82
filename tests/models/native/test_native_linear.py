"""Linear layers by our own products against PyTorch's in float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ultrathink_model.models.native import linear as module
from ultrathink_model.models.native.linear import FEWEST_ROWS, linear
from ultrathink_model.models.recomputation import KEPT

pytestmark = pytest.mark.usefixtures("build")


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def results(function, x: Tensor, weight: Tensor, direction: Tensor) -> list[Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    product = function(x, weight)
    product.backward(direction)
    return [product.detach(), x.grad, weight.grad]


# Sizes around those of tiles (8 × 32 and smaller), blocks (64 rows) and depths (384 terms), and none of them.
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [256, 301])
@pytest.mark.parametrize(("inner", "outer"), [(24, 40), (1, 7), (33, 31), (400, 65), (64, 800)])
def test_values_and_gradients_are_pytorchs(rows, inner, outer):
    operands = draw(rows, inner), draw(outer, inner), draw(rows, outer)
    ours = results(linear, *operands)
    expected = results(nn.functional.linear, *(operand.double() for operand in operands))
    for own, reference in zip(ours, expected, strict=True):
        # Sums over up to 800 terms of the order of 1.
        torch.testing.assert_close(own.double(), reference, rtol=1e-4, atol=5e-5)
        assert own.is_contiguous()


def test_strided_operands_are_taken():
    x, weight, direction = draw(16, 20, 12).transpose(0, 1), draw(12, 9).T, draw(20, 16, 9)
    for own, expected in zip(
        results(linear, x, weight, direction), results(nn.functional.linear, x, weight, direction), strict=True
    ):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(("x_learns", "weight_learns"), [(True, False), (False, True)])
def test_what_is_frozen_has_no_gradient_and_nothing_is_kept_for_it(x_learns, weight_learns):
    x, weight = draw(FEWEST_ROWS, 4).requires_grad_(x_learns), draw(3, 4).requires_grad_(weight_learns)
    product = linear(x, weight)
    assert [tensor is not None for tensor in product.grad_fn.saved_tensors] == [weight_learns, x_learns]
    product.sum().backward()
    assert (x.grad is not None, weight.grad is not None) == (x_learns, weight_learns)


def test_what_it_is_not_made_for_is_left_to_pytorch():
    x, weight = draw(FEWEST_ROWS, 4), draw(3, 4)
    assert linear(x, weight) is not None
    assert linear(x, nn.Parameter(weight)) is not None
    assert linear(x.double(), weight.double()) is None
    assert linear(x.to("meta"), weight.to("meta")) is None
    assert linear(x[1:], weight) is None
    assert linear(x, weight.as_subclass(Subclass)) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight) is None


class Subclass(Tensor):
    """Stands for a `DTensor`, whose product is an operation of all ranks."""


def test_operations_are_counted():
    x, weight = draw(FEWEST_ROWS, 4).requires_grad_(), draw(3, 4).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * FEWEST_ROWS * 4 * 3


def test_operators_keep_the_rules_that_compilation_relies_on():
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(module.LINEAR, (draw(2, 5, 6), draw(4, 6)), test_utils=checks)
    for x, weight in ((draw(2, 5, 6), draw(4, 6)), (draw(2, 5, 6), None), (None, draw(4, 6))):
        torch.library.opcheck(module.LINEAR_GRAD, (draw(2, 5, 4), x, weight), test_utils=checks)


def test_selective_recomputation_keeps_products():
    assert module.LINEAR in KEPT
