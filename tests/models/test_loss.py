"""The chunked cross-entropy against PyTorch's, its gradients by finite differences, and what it holds in memory."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ultrathink_model.models.loss import chunked_cross_entropy

VOCAB, HIDDEN = 50, 16


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """States, output weights and labels of 3 × 11 tokens, a third of them left out."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, HIDDEN, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, requires_grad=True)
    labels = torch.randint(0, VOCAB, (3, 11), generator=generator)
    labels[torch.rand(3, 11, generator=generator) < 1 / 3] = -100
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss_weight: float = 0.0) -> tuple[Tensor, Tensor]:
    """The same two sums with all logits at once."""
    logits = (hidden @ weight.T).flatten(0, 1)
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
    squares = logits.logsumexp(dim=1).square()[labels.flatten() != -100]
    return loss, z_loss_weight * squares.sum()


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.01])
@pytest.mark.parametrize("chunk_size", [1, 7, 33, 1000])
def test_values_and_gradients_equal_cross_entropy(chunk_size, z_loss_weight):
    hidden, weight, labels = problem()
    loss, z_loss = chunked_cross_entropy(hidden, weight, labels, chunk_size, z_loss_weight)
    expected = plain(hidden, weight, labels, z_loss_weight)
    torch.testing.assert_close((loss, z_loss), expected, atol=1e-4, rtol=1e-6)
    gradients = torch.autograd.grad(3 * (loss + z_loss), (hidden, weight))
    expected_gradients = torch.autograd.grad(3 * sum(expected), (hidden, weight))
    torch.testing.assert_close(gradients, expected_gradients, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.3])
def test_gradients_equal_finite_differences(z_loss_weight):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[3, -100, 0, 6, 6], [1, 2, -100, -100, 5]])
    assert gradcheck(lambda h, w: sum(chunked_cross_entropy(h, w, labels, 3, z_loss_weight)), (hidden, weight))


def test_labels_left_out_count_for_nothing():
    hidden, weight, labels = problem()
    loss, _ = chunked_cross_entropy(hidden, weight, torch.full_like(labels, -100), 8, 0.1)
    loss.backward()
    assert loss == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


@pytest.mark.parametrize("needed", ["hidden", "weight", "neither"])
def test_only_the_wanted_gradients_are_made(needed):
    hidden, weight, labels = problem()
    expected, _ = plain(hidden, weight, labels)
    hidden, weight = hidden.detach(), weight.detach()
    wanted = {"hidden": hidden, "weight": weight}.get(needed)
    if wanted is not None:
        wanted.requires_grad_()
    loss, _ = chunked_cross_entropy(hidden, weight, labels, 8)
    torch.testing.assert_close(loss, expected)
    assert loss.requires_grad == (wanted is not None)
    if wanted is not None:
        loss.backward()
        assert wanted.grad.abs().max() > 0


def test_sums_add_over_parts_of_the_batch():
    hidden, weight, labels = problem()
    whole = chunked_cross_entropy(hidden, weight, labels, 8, 0.1)
    parts = [chunked_cross_entropy(hidden[rows], weight, labels[rows], 8, 0.1) for rows in (slice(1), slice(1, 3))]
    torch.testing.assert_close(tuple(map(sum, zip(*parts, strict=True))), whole)


def test_autocast_rounds_the_products_and_keeps_the_sums_in_float32():
    hidden, weight, labels = problem()
    exact, _ = chunked_cross_entropy(hidden, weight, labels, 8)
    expected = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = chunked_cross_entropy(hidden, weight, labels, 8)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32
    # Logits of the order of 4, rounded to 8 bits, are off by up to 0.02; gradients are of the order of 1.
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)
    for ours, other in zip(gradients, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, other, atol=0.05, rtol=0.05)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [part for part in (result if isinstance(result, tuple | list) else [result]) if isinstance(part, Tensor)]
        self.elements = max([self.elements, *(part.numel() for part in made)])
        return result


def test_no_more_logits_than_a_chunks_are_ever_held():
    hidden, weight, labels = problem()
    with LargestTensor() as largest:
        loss, _ = chunked_cross_entropy(hidden, weight, labels, chunk_size=4, z_loss_weight=0.1)
        loss.backward()
    assert largest.elements == max(VOCAB * HIDDEN, hidden.numel(), 4 * VOCAB)
    assert largest.elements < labels.numel() * VOCAB
