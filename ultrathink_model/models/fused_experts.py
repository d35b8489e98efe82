"""Experts whose whole feed-forward is one operator on a processor, in C++ that is compiled when a run asks for it.

The operators of `dispatch` write every copy of every token to memory between one and the next. Here a thread takes an
expert from the gathering of its rows to the second product, while its cache holds them; the products are MKL's.
"""

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ultrathink_model.models.dispatch import Dispatch
from ultrathink_model.models.mkl import mkl_function
from ultrathink_model.models.moe import MixtureOfExperts
from ultrathink_model.models.recomputation import KEPT

SOURCE = Path(__file__).with_suffix(".cpp")
# No flag that lets sums be taken in another order: results are to be repeatable wherever they are compiled alike.
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]

logger = logging.getLogger(__name__)


def find_compiler() -> str | None:
    """The C++ compiler that `torch.compile` would take, too: `CXX`, else g++ or clang++."""
    return next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)


def fuse_experts(model: nn.Module) -> bool:
    """Has the mixtures of a model, or one of them, take the fused operator for what it can take.

    Returns:
        Whether there are mixtures, a compiler, and a PyTorch with MKL.
    """
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    if not mixtures or _library() is None:
        return False
    for mixture in mixtures:
        mixture.fused = mix_experts
    return True


def mix_experts(
    rows: Float[Tensor, "tokens hidden"],
    weights: Float[Tensor, "tokens top_k"],
    dispatch: Dispatch,
    gate_up: Float[Tensor, "experts double_width hidden"],
    down: Float[Tensor, "experts hidden width"],
) -> Float[Tensor, "tokens hidden"] | None:
    """Each token's sum of `weight · down_e(silu(gate_e(x)) · up_e(x))` over its copies; None where that is not for us.

    Only float32 is, on a processor, with matrices in one piece and an expert at least for each thread.
    """
    operands = (rows, weights, gate_up, down)
    if (
        any(x.dtype != torch.float32 or x.device.type != "cpu" or not x.numel() for x in operands)
        or not all(type(matrices) in (Tensor, nn.Parameter) for matrices in (gate_up, down))
        or gate_up.shape[0] < torch.get_num_threads()
    ):
        return None
    mixed, _ = _fused_experts(rows, weights, dispatch.slots, dispatch.places, dispatch.ends, gate_up, down)
    return mixed


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The C++ functions, compiled for this processor; None, with a line in the log, where that cannot be."""
    product, set_threads = mkl_function("sgemm_"), mkl_function("MKL_Set_Num_Threads_Local")
    compiler = find_compiler()
    if product is None or set_threads is None or compiler is None:
        logger.info("experts are not fused: that takes a C++ compiler, and a PyTorch for the CPU with MKL")
        return None
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "fused_experts.so"
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            logger.warning("experts are not fused: %s could not compile %s:\n%s", compiler, SOURCE, done.stderr.strip())
            return None
        try:
            library = ctypes.CDLL(str(built))
        except OSError as error:  # a folder for temporary files that no code may run from
            logger.warning("experts are not fused: %s", error)
            return None
    pointer = ctypes.c_void_p
    library.use_library.argtypes = [pointer, pointer]
    library.forward.argtypes = [pointer] * 10 + [ctypes.c_int64] * 5 + [ctypes.c_int]
    library.backward.argtypes = [pointer] * 14 + [ctypes.c_int64] * 5 + [ctypes.c_int]
    for function in (library.use_library, library.forward, library.backward):
        function.restype = None
    library.use_library(*(ctypes.cast(function, pointer) for function in (product, set_threads)))
    return library


def _call(name: str, tensors: list[Tensor], weights: Tensor, down: Tensor) -> None:
    """Calls a function of the library with contiguous tensors, in its order."""
    library = _library()
    assert library is not None
    assert all(tensor.is_contiguous() for tensor in tensors)
    addresses = [tensor.data_ptr() for tensor in tensors]
    getattr(library, name)(*addresses, *weights.shape, *down.shape, torch.get_num_threads())


@torch.library.custom_op("ultrathink::fused_experts", mutates_args=())
def _fused_experts(
    rows: Tensor, weights: Tensor, slots: Tensor, places: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """The mixed rows, and the products of `gate_up` for the backward pass."""
    inner = rows.new_empty(slots.shape[0], gate_up.shape[1])
    out, mixed = rows.new_empty(slots.shape[0], rows.shape[1]), rows.new_empty(rows.shape)
    given = [tensor.contiguous() for tensor in (rows, weights, slots, places, ends, gate_up, down)]
    _call("forward", [*given, inner, out, mixed], weights, down)
    return mixed, inner


@torch.library.custom_op("ultrathink::fused_experts_grad", mutates_args=())
def _fused_experts_grad(
    grad: Tensor,
    rows: Tensor,
    inner: Tensor,
    weights: Tensor,
    slots: Tensor,
    places: Tensor,
    ends: Tensor,
    gate_up: Tensor,
    down: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of rows, weights, gate_up and down."""
    copies_grad = rows.new_empty(slots.shape[0], rows.shape[1])
    rows_grad, weights_grad, gate_up_grad, down_grad = (x.new_empty(x.shape) for x in (rows, weights, gate_up, down))
    given = [tensor.contiguous() for tensor in (grad, rows, inner, weights, slots, places, ends, gate_up, down)]
    _call("backward", [*given, copies_grad, rows_grad, weights_grad, gate_up_grad, down_grad], weights, down)
    return rows_grad, weights_grad, gate_up_grad, down_grad


@_fused_experts.register_fake
def _(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    rows, _, slots, _, _, gate_up, _ = tensors
    return rows.new_empty(rows.shape), rows.new_empty(slots.shape[0], gate_up.shape[1])


@_fused_experts_grad.register_fake
def _(*tensors: Tensor) -> list[Tensor]:
    _, rows, _, weights, _, _, _, gate_up, down = tensors
    return [tensor.new_empty(tensor.shape) for tensor in (rows, weights, gate_up, down)]


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    rows, weights, slots, places, ends, gate_up, down, inner = ctx.saved_tensors
    rows_grad, weights_grad, gate_up_grad, down_grad = _fused_experts_grad(
        grad, rows, inner, weights, slots, places, ends, gate_up, down
    )
    return rows_grad, weights_grad, None, None, None, gate_up_grad, down_grad


_fused_experts.register_autograd(_backward, setup_context=_save)
# Selective recomputation keeps products.
KEPT.append(torch.ops.ultrathink.fused_experts.default)


@register_flop_formula([torch.ops.ultrathink.fused_experts])
def _operations(rows: Any, weights: Any, slots: Any, places: Any, ends: Any, gate_up: Any, down: Any, **_: Any) -> int:
    return 2 * slots[0] * (gate_up[1] * gate_up[2] + down[1] * down[2])


@register_flop_formula([torch.ops.ultrathink.fused_experts_grad])
def _grad_operations(*shapes: Any, **_: Any) -> int:
    slots, gate_up, down = shapes[4], shapes[7], shapes[8]
    return 2 * 2 * slots[0] * (gate_up[1] * gate_up[2] + down[1] * down[2])
