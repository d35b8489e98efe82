"""Linear layers by oneDNN against PyTorch's own."""

import importlib
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ultrathink_model.models import linear
from ultrathink_model.models.linear import Linear, takes_onednn
from ultrathink_model.models.loss import chunked_cross_entropy

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN")


@pytest.fixture(autouse=True)
def _on_a_processor_where_onednn_is_faster(monkeypatch):
    monkeypatch.setattr(linear, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(linear, "SMALLEST", 1)


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).requires_grad_()


@pytest.mark.parametrize(("inner", "outer"), [(24, 40), (40, 24), (1, 7)])
def test_values_and_gradients_equal_pytorchs(inner, outer):
    results = []
    for is_faster in (True, False):
        linear.ONEDNN_IS_FASTER = is_faster
        layer, x = Linear(inner, outer), draw(3, 50, inner)
        layer.weight = nn.Parameter(draw(outer, inner).detach())
        product = layer(x)
        product.backward(draw(3, 50, outer).detach())
        results.append((product, x.grad, layer.weight.grad))
        assert layer.weight.grad.is_contiguous()
    for own, expected in zip(*results, strict=True):
        # Sums over up to 150 rows of values of the order of 1.
        torch.testing.assert_close(own, expected, atol=2e-5, rtol=1e-5)


def test_operator_keeps_the_rules_that_compilation_relies_on():
    torch.library.opcheck(
        torch.ops.ultrathink_model_models_linear.onednn_linear.default,
        (draw(2, 5, 6).detach(), draw(4, 6).detach()),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_layer_and_loss_take_it_in_training_and_count_the_same_operations():
    layer, x, vocabulary = Linear(24, 16), draw(2, 8, 24), draw(32, 16)
    labels = torch.arange(16).view(2, 8)
    counts = []
    for is_faster in (True, False):
        linear.ONEDNN_IS_FASTER = is_faster
        with FlopCounterMode(display=False) as counter:
            chunked_cross_entropy(layer(x), vocabulary, labels, chunk_size=16)[0].backward()
        counts.append(counter)
    assert counts[0].get_total_flops() == counts[1].get_total_flops() == 3 * 2 * 16 * (24 * 16 + 16 * 32)
    operators = [{str(operator) for operator in count.get_flop_counts()["Global"]} for count in counts]
    assert [f"{linear.NAMESPACE}.onednn_linear" in names for names in operators] == [True, False]


def test_loss_in_chunks_equals_pytorchs():
    results = []
    labels = torch.tensor([[0, 5, -100, 3, 6], [1, 2, 3, -100, 4]])
    for is_faster in (True, False):
        linear.ONEDNN_IS_FASTER = is_faster
        hidden, weight = draw(2, 5, 8), draw(7, 8)
        loss = chunked_cross_entropy(hidden, weight, labels, chunk_size=4, z_loss_weight=1e-2)[0]
        loss.backward()
        results.append((loss, hidden.grad, weight.grad))
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("x_learns", "weight_learns"), [(True, False), (False, True)])
def test_what_is_frozen_has_no_gradient_and_nothing_is_kept_for_it(x_learns, weight_learns):
    layer, x = Linear(4, 3), draw(2, 5, 4).detach().transpose(0, 1).requires_grad_(x_learns)
    layer.weight.requires_grad_(weight_learns)
    product = layer(x)
    assert [tensor is not None for tensor in product.grad_fn.saved_tensors] == [weight_learns, x_learns]
    product.sum().backward()
    if x_learns:
        torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand_as(x))
    if weight_learns:
        torch.testing.assert_close(layer.weight.grad, x.sum(dim=(0, 1)).expand(3, -1))


def test_module_may_be_executed_again(monkeypatch):
    monkeypatch.delitem(sys.modules, linear.__name__)
    again = importlib.import_module(linear.__name__)
    x, weight = draw(2, 4).detach(), draw(3, 4).detach()
    assert torch.equal(again.onednn_linear(x, weight), linear.onednn_linear(x, weight))


def test_layer_keeps_to_pytorchs_product_out_of_training(monkeypatch):
    monkeypatch.setattr(linear, "_OneDNNLinear", None)  # calling it fails
    layer = Linear(4, 3)
    layer.eval()(draw(2, 4))
    with torch.no_grad():
        layer.train()(draw(2, 4))


def test_small_products_other_formats_other_processors_and_cut_weights_keep_to_pytorchs_product(monkeypatch):
    x, weight = torch.randn(2, 4), torch.randn(3, 4)
    assert takes_onednn(x, weight)
    assert takes_onednn(x, nn.Parameter(weight))
    assert not takes_onednn(x.double(), weight.double())
    assert not takes_onednn(x.to("meta"), weight.to("meta"))
    assert not takes_onednn(x[:0], weight)
    monkeypatch.setattr(linear, "SMALLEST", 2 * 4 * 3)
    assert takes_onednn(x, weight)
    assert not takes_onednn(x[:1], weight)
    assert not takes_onednn(x, weight.as_subclass(Subclass))
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_onednn(x, weight)
    monkeypatch.setattr(linear, "ONEDNN_IS_FASTER", False)
    assert not takes_onednn(x, weight)


class Subclass(Tensor):
    """Stands for a `DTensor`, whose product is an operation of all ranks."""
