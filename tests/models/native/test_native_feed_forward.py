"""The feed-forward as one operator against PyTorch's operators in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ultrathink_model.models.native import feed_forward as module
from ultrathink_model.models.native.feed_forward import feed_forward
from ultrathink_model.models.native.linear import FEWEST_ROWS
from ultrathink_model.models.recomputation import KEPT

pytestmark = pytest.mark.usefixtures("build")


def draw(rows: int, hidden: int, width: int, spread: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, hidden), (2 * width, hidden), (hidden, width)]
    x, gate_up, down = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x, gate_up * spread, down]


def plain(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


# The gates at 50 leave exp's range.
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("rows", "hidden", "width", "spread"), [(256, 24, 40, 1.0), (300, 33, 17, 1.0), (256, 8, 420, 50.0)]
)
def test_values_and_gradients_are_those_of_the_operators_in_float64(rows, hidden, width, spread):
    results = []
    for function, dtype in ((feed_forward, torch.float32), (plain, torch.float64)):
        operands = [part.to(dtype).requires_grad_() for part in draw(rows, hidden, width, spread)]
        out = function(*operands)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
        results.append([out.detach(), *(operand.grad for operand in operands)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=5e-6 * float(reference.abs().max()))


def test_what_it_is_not_made_for_is_left_to_the_operators():
    operands = draw(FEWEST_ROWS, 8, 4)
    assert feed_forward(*operands) is not None
    assert feed_forward(*(part.double() for part in operands)) is None
    assert feed_forward(operands[0][1:], *operands[1:]) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert feed_forward(*operands) is None


def test_operations_are_counted_as_those_of_the_operators():
    counts = []
    for function in (feed_forward, plain):
        operands = [part.requires_grad_() for part in draw(FEWEST_ROWS, 8, 4)]
        with FlopCounterMode(display=False) as counter:
            function(*operands).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * FEWEST_ROWS * 3 * 8 * 4


def test_operators_keep_the_rules_that_compilation_relies_on():
    operands = draw(10, 8, 4)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(module.FEED_FORWARD, operands, test_utils=checks)
    out, inner = module.FEED_FORWARD(*operands)
    torch.library.opcheck(module.FEED_FORWARD_GRAD, (out, *operands, inner), test_utils=checks)


def test_selective_recomputation_keeps_its_products():
    assert module.FEED_FORWARD in KEPT
