"""SwiGLU: the gradient of our own against autograd's and finite differences, and what it keeps."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from ultrathink_model.models.swiglu import swiglu


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def test_gradients_equal_finite_differences():
    gate_up, scale = random(2, 3, 8, dtype=torch.float64), random(2, 3, 1, seed=1, dtype=torch.float64)
    assert gradcheck(swiglu, (gate_up,))
    assert gradcheck(swiglu, (gate_up, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_the_formula(dtype):
    gate_up, scale = random(7, 24, dtype=dtype), random(7, 1, seed=1, dtype=dtype)
    other, other_scale = (part.detach().float().requires_grad_() for part in (gate_up, scale))
    gate, up = other.chunk(2, dim=-1)
    expected = F.silu(gate) * up * other_scale
    result = swiglu(gate_up, scale)
    bound = 8 * torch.finfo(dtype).eps  # a few roundings of values of the order of 1
    torch.testing.assert_close(result.float(), expected, atol=bound, rtol=bound)
    result.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(gate_up.grad.float(), other.grad, atol=bound, rtol=bound)
    torch.testing.assert_close(scale.grad.float(), other_scale.grad, atol=8 * bound, rtol=8 * bound)


def test_only_the_input_is_kept_for_the_backward_pass():
    kept = []
    gate_up = random(7, 24)
    with torch.autograd.graph.saved_tensors_hooks(lambda part: kept.append(part) or part, lambda part: part):
        swiglu(gate_up)
    assert [part.data_ptr() for part in kept] == [gate_up.data_ptr()]
