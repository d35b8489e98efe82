"""RMSNorm: the gradient of our own against PyTorch's and finite differences."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from ultrathink_model.models.norm import RMSNorm


def layer(width: int, eps: float = 1e-6) -> RMSNorm:
    norm = RMSNorm(width, eps=eps)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.5, generator=torch.Generator().manual_seed(1))
    return norm


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_gradients_equal_finite_differences():
    norm = layer(6, eps=0.1).double()
    x = states(2, 3, 6).double().requires_grad_()
    assert gradcheck(lambda x, _: norm(x), (x, norm.weight))


# The formats keep 24, 8 and 11 bits; sums over 64 rows of values of the order of 1 are off by a few roundings.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 32), (4, 16, 3, 8), (1, 1, 5)])
def test_values_and_gradients_equal_pytorchs(shape, dtype):
    norm = layer(shape[-1])
    x = states(*shape).to(dtype).requires_grad_()
    other_x, other_weight = (part.detach().float().requires_grad_() for part in (x, norm.weight))
    result, expected = norm(x), F.rms_norm(other_x, shape[-1:], other_weight, 1e-6)
    assert result.dtype == dtype
    bound = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(result.float(), expected, atol=bound, rtol=bound)
    direction = states(*shape).roll(1).to(dtype)
    result.backward(direction)
    expected.backward(direction.float())
    torch.testing.assert_close(x.grad.float(), other_x.grad, atol=bound, rtol=bound)
    torch.testing.assert_close(norm.weight.grad, other_weight.grad, atol=8 * bound, rtol=bound)


def test_strided_rows_and_gradients_are_taken():
    norm = layer(8)
    base = states(4, 6, 16).requires_grad_()
    parts = base.split(8, dim=-1)[1]
    other = base.detach().clone().requires_grad_()
    norm(parts).transpose(0, 1).square().sum().backward()
    F.rms_norm(other.split(8, dim=-1)[1], (8,), norm.weight, 1e-6).square().sum().backward()
    torch.testing.assert_close(base.grad, other.grad, atol=1e-5, rtol=1e-5)


def test_row_of_zeros_has_a_finite_gradient():
    norm, x = layer(8), torch.zeros(2, 8, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad.isfinite().all()
