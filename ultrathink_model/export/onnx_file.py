"""ONNX: the decoder as a graph that onnxruntime runs, in float32 or with int8 weights."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ultrathink_model.export.extras import require, require_all
from ultrathink_model.export.static_decoder import StaticDecoder
from ultrathink_model.models.transformer import Transformer

PACKAGES = ["onnx", "onnxscript", "onnxruntime"]
# Weights within the file itself; protobuf's limit is 2 GiB, beyond which they lie beside it.
LARGEST_FILE = 1 << 30
# Numbers that share a scale, along the axis that a product sums over.
BLOCK = 32
# A smaller constant is not worth a scale of its own.
LEAST_WEIGHTS = 1024
# DequantizeLinear has scales for blocks from this version of the operators on.
BLOCKED_SCALES = 21
EXAMPLE_TOKENS = 8


def write_onnx(model: Transformer, path: Path) -> None:
    """Writes the graph of a model: `input_ids` (batch, sequence) to `logits`, and `harm` where there is a harm head.

    Rows are whole texts without padding; the graph has no cache, so each new token costs a pass over the text.

    Raises:
        DependencyError: The packages of ONNX are not installed.
    """
    require_all(PACKAGES, "export")
    decoder = StaticDecoder(model).eval()
    tokens = torch.zeros(2, EXAMPLE_TOKENS, dtype=torch.int64)
    longest = model.config.model.max_seq_length
    dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=longest)}
    with torch.no_grad(), _quietly():
        program = torch.onnx.export(
            decoder,
            (tokens,),
            dynamo=True,
            input_names=["input_ids"],
            output_names=["logits"] if model.harm_head is None else ["logits", "harm"],
            dynamic_shapes={"input_ids": dimensions},
            verbose=False,
        )
        assert program is not None  # only the older exporter returns nothing
        size = sum(weight.nbytes for weight in decoder.state_dict().values())
        program.save(path, external_data=size > LARGEST_FILE)


def write_int8_onnx(source: Path, path: Path) -> None:
    """Writes a graph's matrices as int8 with a scale for each 32 numbers; the arithmetic stays float32.

    Only standard operators are used, so that any runtime reads it: a `DequantizeLinear` before each product. In
    onnxruntime the session option `session.disable_quant_qdq` set to `1` unpacks all weights once, when it loads.

    Raises:
        DependencyError: The packages of ONNX are not installed.
    """
    onnx = require("onnx", "export")
    model = onnx.load(str(source))
    graph = model.graph
    summed = _summed_axes(graph)
    for weight in list(graph.initializer):
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype != np.float32 or weight.name not in summed or values.size < LEAST_WEIGHTS:
            continue
        axis = summed[weight.name] % values.ndim
        numbers, scales = quantise(values, axis)
        names = [f"{weight.name}_int8", f"{weight.name}_scale"]
        graph.initializer.remove(weight)
        graph.initializer.extend(map(onnx.numpy_helper.from_array, (numbers, scales), names))
        unpack = onnx.helper.make_node(
            "DequantizeLinear", names, [weight.name], name=f"unpack_{weight.name}", axis=axis, block_size=BLOCK
        )
        graph.node.insert(0, unpack)
    for operators in model.opset_import:
        if operators.domain == "":
            operators.version = max(operators.version, BLOCKED_SCALES)
    large = model.ByteSize() > LARGEST_FILE
    onnx.save(model, str(path), save_as_external_data=large, location=f"{path.name}.data")


def quantise(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Int8 numbers of the same shape, and the scales of each block along `axis`: value = number · scale."""
    length = values.shape[axis]
    blocks = -(-length // BLOCK)
    padding = [(0, 0)] * values.ndim
    padding[axis] = (0, blocks * BLOCK - length)
    moved = np.moveaxis(np.pad(values, padding), axis, -1)
    blocked = moved.reshape(*moved.shape[:-1], blocks, BLOCK)
    scales = np.maximum(np.abs(blocked).max(axis=-1) / 127, np.finfo(np.float32).tiny)
    numbers = np.rint(blocked / scales[..., None]).astype(np.int8).reshape(moved.shape)[..., :length]
    return (
        np.ascontiguousarray(np.moveaxis(numbers, -1, axis)),
        np.ascontiguousarray(np.moveaxis(scales.astype(np.float32), -1, axis)),
    )


def _summed_axes(graph: Any) -> dict[str, int]:
    """The axis of each constant that products sum over: a right factor's rows, an embedding's or transposed one's columns."""
    axes = {}
    for node in graph.node:
        if node.op_type == "MatMul":
            axes[node.input[1]] = -2
        elif node.op_type in ("Gather", "Transpose"):
            axes[node.input[0]] = -1
        elif node.op_type == "Gemm":
            transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            axes[node.input[1]] = -1 if transposed else -2
    return axes


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says of packages and of itself; what it cannot do it raises."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
