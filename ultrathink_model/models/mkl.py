"""Many matrix products of different sizes in one call of MKL, PyTorch's library for float32 products on x86 processors.

PyTorch's own grouped products are a loop on the CPU, where each goes over all threads and waits for the slowest of
them. In one call every thread has products of its own, which takes half to all of the time of the loop as long as the
products are small.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# From MKL's mkl_cblas.h.
ROW_MAJOR, AS_IT_IS, TRANSPOSED = 101, 111, 112
# Rows of all groups from which on one call makes up for what it takes to describe it, and rows of a group, on average,
# from which on a product takes longer in one thread than its share of all.
FEWEST_ROWS, LARGE_GROUP = 64, 512

Sizes = NDArray[np.int32]
Addresses = NDArray[np.int64]


def mkl_function(name: str) -> Any | None:
    """A function of the MKL within PyTorch, for `ctypes`; None where it has no MKL, or does not export this one."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not (torch.backends.mkl.is_available() and library.exists()):
        return None
    return getattr(ctypes.CDLL(str(library)), name, None)


@functools.cache
def _batched_product() -> Callable[..., None] | None:
    function = mkl_function("cblas_sgemm_batch")
    if function is not None:
        function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 13, ctypes.c_int, ctypes.c_void_p]
        function.restype = None
    return function


def mkl_is_faster(left: Tensor, right: Tensor, ends: Tensor) -> bool:
    """Whether this PyTorch has the call, and takes longer by itself for products of these."""
    return (
        FEWEST_ROWS <= left.shape[0] < LARGE_GROUP * ends.shape[0]
        and all(x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 for x in (left, right))
        and _batched_product() is not None
    )


def mkl_grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`rows[i] · weight[e]ᵀ` with the expert e whose range of rows holds i.

    Args:
        rows: (rows, inner).
        weight: (experts, outer, inner).
        ends: (experts,), one past the last row of each.

    Returns:
        (rows, outer); rows behind the last end are undefined.
    """
    experts, outer, inner = weight.shape
    rows, transposed = rows.contiguous(), not weight.mT.is_contiguous()
    weight = weight.contiguous() if transposed else weight
    out = rows.new_empty(rows.shape[0], outer)
    starts, heights = _ranges(ends)
    _multiply(
        (AS_IT_IS, TRANSPOSED if transposed else AS_IT_IS),
        (heights, _repeat(outer, experts), _repeat(inner, experts)),
        (_addresses(rows, starts), _addresses(weight, _count(experts)), _addresses(out, starts)),
        (inner, inner if transposed else outer, outer),
    )
    return out


def mkl_grouped_outer_product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """`left[range]ᵀ · right[range]` for each range of rows.

    Args:
        left: (rows, outer).
        right: (rows, inner).
        ends: (experts,), one past the last row of each.

    Returns:
        (experts, outer, inner), zeros where a range is empty.
    """
    experts, outer, inner = ends.shape[0], left.shape[1], right.shape[1]
    left, right = left.contiguous(), right.contiguous()
    out = left.new_empty(experts, outer, inner)
    starts, heights = _ranges(ends)
    _multiply(
        (TRANSPOSED, AS_IT_IS),
        (_repeat(outer, experts), _repeat(inner, experts), heights),
        (_addresses(left, starts), _addresses(right, starts), _addresses(out, _count(experts))),
        (outer, inner, inner),
    )
    return out


def _multiply(
    transpositions: tuple[int, int],
    sizes: tuple[Sizes, Sizes, Sizes],
    addresses: tuple[Addresses, Addresses, Addresses],
    row_lengths: tuple[int, int, int],
) -> None:
    """Writes `left · right` of each group to its place.

    Args:
        transpositions: Whether the left and the right operands lie transposed in memory.
        sizes: Heights and widths of the results, and lengths of the sums, each of a group.
        addresses: Of the left and right operands and the results.
        row_lengths: Elements from one row to the next in each of them.
    """
    function, groups = _batched_product(), len(addresses[0])
    assert function is not None
    left_form, right_form = (_repeat(transposition, groups) for transposition in transpositions)
    left_row, right_row, out_row = (_repeat(length, groups) for length in row_lengths)
    left, right, out = addresses
    arrays = (
        left_form,
        right_form,
        *sizes,
        _ones(groups),
        left,
        left_row,
        right,
        right_row,
        _zeros(groups),
        out,
        out_row,
    )
    function(ROW_MAJOR, *[array.ctypes.data for array in arrays], groups, _repeat(1, groups).ctypes.data)


def _ranges(ends: Tensor) -> tuple[NDArray[np.int64], Sizes]:
    """The first row of each range and how many it has."""
    last = ends.numpy()
    starts = np.zeros(len(last), np.int64)
    starts[1:] = last[:-1]
    return starts, (last - starts).astype(np.int32)


def _addresses(tensor: Tensor, indices: NDArray[np.int64]) -> Addresses:
    """Where these entries of the first axis begin."""
    return tensor.data_ptr() + indices * (tensor.stride(0) * tensor.element_size())


# What follows depends on little and is asked for in each product.
@functools.lru_cache(maxsize=1024)
def _repeat(value: int, groups: int) -> Sizes:
    return np.full(groups, value, np.int32)


@functools.lru_cache
def _count(groups: int) -> NDArray[np.int64]:
    return np.arange(groups, dtype=np.int64)


@functools.lru_cache
def _ones(groups: int) -> NDArray[np.float32]:
    return np.ones(groups, np.float32)


@functools.lru_cache
def _zeros(groups: int) -> NDArray[np.float32]:
    return np.zeros(groups, np.float32)
