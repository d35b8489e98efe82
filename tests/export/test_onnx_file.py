import numpy as np
import pytest
import torch
from routed_cases import DEPTHS, EXPERTS, routed_model

from ultrathink_model.export.onnx_file import BLOCK, quantise, write_int8_onnx, write_onnx

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_quantised_numbers_are_within_half_a_step(axis):
    values = np.random.default_rng(0).normal(size=(5, 70, 33)).astype(np.float32)
    numbers, scales = quantise(values, axis)
    assert numbers.dtype == np.int8
    assert scales.shape[axis] == -(-values.shape[axis] // BLOCK)
    steps = np.repeat(scales, BLOCK, axis=axis).take(range(values.shape[axis]), axis=axis)
    assert (np.abs(numbers * steps - values) <= steps * 0.5001).all()


def test_zeros_are_quantised_to_zeros():
    numbers, scales = quantise(np.zeros((2, 40), dtype=np.float32), 1)
    assert not numbers.any()
    assert np.isfinite(scales).all()


def run_graph(path, tokens):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"input_ids": tokens.numpy()}), strict=True))


# Each graph takes torch's exporter 10 to 40 s of a busy core.
@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [["model.num_layers=2"], [*EXPERTS, *DEPTHS, "model.num_layers=2", "advanced.enable_constitutional=true"]],
    ids=["dense", "experts, depths and harm"],
)
@torch.no_grad()
def test_onnxruntime_computes_the_models_logits_at_any_shape(tmp_path, overrides):
    model = routed_model(*overrides)
    write_onnx(model, tmp_path / "model.onnx")
    write_int8_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    for shape in ((1, 1), (3, 21), (2, 64)):
        tokens = torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(1))
        expected = model(tokens)
        found = run_graph(tmp_path / "model.onnx", tokens)
        np.testing.assert_allclose(found["logits"], expected.logits.numpy(), atol=1e-4, rtol=1e-4)
        assert ("harm" in found) is (model.harm_head is not None)
    rounded = run_graph(tmp_path / "int8.onnx", tokens)["logits"]
    assert 0 < np.abs(rounded - expected.logits.numpy()).mean() < 0.1 * expected.logits.std()
    assert (tmp_path / "int8.onnx").stat().st_size < 0.75 * (tmp_path / "model.onnx").stat().st_size
