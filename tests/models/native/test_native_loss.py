"""The native losses of a chunk against the plain ones in float64."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ultrathink_model.models import loss
from ultrathink_model.models.native import loss as native

pytestmark = pytest.mark.usefixtures("build")


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("rows", "hidden_size", "vocab"), [(1, 8, 5), (70, 33, 101), (130, 16, 800)])
@pytest.mark.parametrize("z_loss_weight", [0.0, 1e-2])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True), (False, False)])
def test_losses_and_gradients_are_the_plain_ones_in_float64(rows, hidden_size, vocab, z_loss_weight, wants):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, hidden_size, generator=generator) for n in (rows, vocab))
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[::3] = loss.IGNORED_LABEL
    results = []
    for function, dtype in ((native.chunk_losses, torch.float32), (loss.chunk_losses, torch.float64)):
        given = hidden.to(dtype), weight.to(dtype)
        # What the weight's gradient had is kept.
        grads = [torch.ones_like(part) if wanted else None for part, wanted in zip(given, wants, strict=True)]
        losses = function(*given, labels, z_loss_weight, *grads)
        results.append([losses, *(grad for grad in grads if grad is not None)])
    assert not results[0][0][:, ::3].any()
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=2e-5)


def test_other_formats_are_left_to_the_plain_ones():
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.int64)
    assert native.chunk_losses(hidden.double(), weight.double(), labels, 0.0, None, None) is None
    assert native.chunk_losses(hidden.bfloat16(), weight.bfloat16(), labels, 0.0, None, None) is None


@pytest.mark.parametrize("label", [5, -1, 70_000_000])
def test_labels_of_no_token_are_refused_before_anything_is_written(label):
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, label, -100])
    with pytest.raises(IndexError, match=f"label {label} is no token of a vocabulary of 5"):
        native.chunk_losses(hidden, weight, labels, 0.0, None, None)
    assert native.chunk_losses(hidden, weight, labels.int(), 0.0, None, None) is None


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7F800001])
def test_what_is_not_a_number_comes_through_whatever_its_bits(bits):
    hidden, weight, labels = torch.ones(3, 4), torch.ones(5, 4), torch.tensor([0, 1, -100])
    weight[3, 2] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    losses = native.chunk_losses(hidden, weight, labels, 0.0, None, None)
    assert losses[0].isnan().tolist() == [True, True, False]


def test_states_in_another_order_are_taken():
    hidden = torch.randn(9, 2, 8).transpose(0, 1).requires_grad_()
    weight, labels = torch.randn(50, 8, requires_grad=True), torch.randint(0, 50, (2, 9))
    results = []
    for function in (native.chunk_losses, None):
        total, _ = loss.chunked_cross_entropy(hidden, weight, labels, 4, 0.0, function)
        results.append([total, *torch.autograd.grad(total, (hidden, weight))])
    for own, plain in zip(*results, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-5)


def test_the_whole_loss_takes_it_and_counts_the_same_operations():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 50, (2, 9), generator=generator)
    results, counts = [], []
    for function in (native.chunk_losses, None):
        hidden = torch.randn(2, 9, 8, generator=generator.manual_seed(1), requires_grad=True)
        weight = torch.randn(50, 8, generator=generator, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            total, _ = loss.chunked_cross_entropy(hidden, weight, labels, 4, 1e-3, function)
            (total / 18).backward()
        results.append([total, hidden.grad, weight.grad])
        counts.append(counter.get_total_flops())
    for own, plain in zip(*results, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-6)
    assert counts[0] == counts[1] == 3 * 2 * 18 * 8 * 50


def test_operator_keeps_the_rules_that_compilation_relies_on():
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.int64)
    given = (hidden, weight, labels, 0.0, torch.zeros_like(hidden), torch.zeros_like(weight))
    torch.library.opcheck(native.CROSS_ENTROPY, given, test_utils=("test_schema", "test_faketensor"))
