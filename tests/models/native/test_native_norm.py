"""The native RMSNorm against PyTorch's in float64."""

import pytest
import torch
from torch.nn import functional as F

from ultrathink_model.models.native import norm as native
from ultrathink_model.models.native.norm import rms_norm

pytestmark = pytest.mark.usefixtures("build")
EPS = 1e-6


# More rows than the 64 of a chunk, more numbers than one thread takes, and widths that no vector divides.
@pytest.mark.parametrize("shape", [(3, 5), (130, 32), (2, 70, 300)])
def test_values_and_gradients_are_pytorchs(shape):
    generator = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(shape, generator=generator) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator)
    results = []
    for function, dtype in ((rms_norm, torch.float32), (plain, torch.float64)):
        operands = [part.clone().to(dtype).requires_grad_() for part in (x, weight)]
        normed = function(*operands, EPS)
        normed.backward(direction.to(dtype))
        results.append([normed.detach(), *(operand.grad for operand in operands)])
    for ours, reference in zip(*results, strict=True):
        # The gradient of the weight sums over 140 rows.
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=2e-5)


def plain(x, weight, eps):
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def test_sums_keep_to_their_chunks_whatever_the_threads(monkeypatch):
    x, weight = torch.randn(500, 300), torch.randn(300)
    grads = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        grads.append(native.RMS_NORM_GRAD(x.roll(1), x, weight, EPS))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_row_of_zeros_has_a_finite_gradient():
    x, weight = torch.zeros(2, 8, requires_grad=True), torch.ones(8)
    rms_norm(x, weight, EPS).sum().backward()
    assert x.grad.isfinite().all()


def test_what_it_is_not_made_for_is_left_to_pytorch():
    x, weight = torch.randn(3, 8), torch.ones(8)
    assert rms_norm(x.bfloat16(), weight.bfloat16(), EPS) is None


def test_operators_keep_the_rules_that_compilation_relies_on():
    x, weight = torch.randn(3, 8), torch.ones(8)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(native.RMS_NORM, (x, weight, EPS), test_utils=checks)
    torch.library.opcheck(native.RMS_NORM_GRAD, (x + 1, x, weight, EPS), test_utils=checks)
