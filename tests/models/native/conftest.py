"""The library as it is compiled for other processors, and with the products that it takes elsewhere."""

import ctypes

import pytest
import torch

from ultrathink_model.models.mkl import mkl_function
from ultrathink_model.models.native import library as native
from ultrathink_model.models.native.library import find_compiler

# What the compiler is told beside the usual, and whether products are MKL's.
BUILDS = {
    "this processor": ([], False),
    "MKL's products": ([], True),
    "AVX2": (["-mno-avx512f"], False),
    "SSE": (["-mno-avx512f", "-mno-avx"], False),
}


@pytest.fixture(scope="module", params=BUILDS)
def build(request):
    """Has the operators of a module's tests run as each build has them."""
    flags, by_mkl = BUILDS[request.param]
    functions = [mkl_function(name) for name in ("sgemm_", "MKL_Set_Num_Threads_Local")]
    if find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    if by_mkl and None in functions:
        pytest.skip("needs a PyTorch with MKL")
    usual = native.FLAGS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "FLAGS", [*usual, *flags])
        clear()
        loaded = native.library()
        assert loaded is not None
        addresses = [ctypes.cast(function, ctypes.c_void_p) if by_mkl else None for function in functions]
        loaded.use_mkl(*addresses)
        yield request.param
        loaded.use_mkl(None, None)  # builds alike are one library
    clear()
    native.library()


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    """Has the operators share their work out over so many threads, whatever PyTorch has."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


def clear() -> None:
    """Has the next call look for the library again."""
    native.library.cache_clear()
    native._function.cache_clear()
