import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ultrathink_model.models.native.kernels import use_native_kernels
from ultrathink_model.models.native.library import library

needs_library = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")
FEATURES = [(), ("advanced.enable_moe=true", "advanced.enable_dre=true", "moe.router_jitter=0.2")]


def passed_back(model) -> tuple[dict[str, torch.Tensor], int, int]:
    """Gradients of a pass, the floating point operations of it, and the bytes kept for the backward pass."""
    torch.manual_seed(0)
    ids = torch.randint(0, 96, (4, 64))
    model.train()
    model.begin_step(3)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(ids, labels=ids).loss_sum
        loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return gradients, counter.get_total_flops(), sum(kept.values())


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("mode", ["whole", "selective"])
def test_recomputation_changes_no_gradient(small_model, features, mode):
    plain, _, _ = passed_back(small_model(*features))
    settings = ("model.gradient_checkpointing=true", f"model.gradient_checkpointing_mode={mode}")
    again, _, _ = passed_back(small_model(*features, *settings))
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_library)])
def test_selective_recomputes_no_product_and_whole_all_of_a_block(small_model, native):
    def operations(*overrides: str) -> int:
        model = small_model("model.head_dim=16", *overrides)
        if native:
            use_native_kernels(model)
        return passed_back(model)[1]

    on = "model.gradient_checkpointing=true"
    plain, whole = operations(), operations(on)
    selective = operations(on, "model.gradient_checkpointing_mode=selective")
    assert selective == plain
    assert whole > 1.15 * plain
