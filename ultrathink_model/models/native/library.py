"""The C++ of this folder as functions: compiled for the processor at hand once, then taken from the user's cache."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ultrathink_model.models.mkl import mkl_function

SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))
# No flag that lets sums be taken in another order: results are to be repeatable wherever they are compiled alike.
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
NAMESPACE = "ultrathink"

logger = logging.getLogger(__name__)


def find_compiler() -> str | None:
    """The C++ compiler that `torch.compile` would take, too: `CXX`, else g++ or clang++."""
    return next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions; None, with a line in the log, where there is no compiler or it fails."""
    compiler = find_compiler()
    if compiler is None or os.name != "posix":
        logger.info("native kernels are off: they take a C++ compiler, on Linux or macOS")
        return None
    try:
        loaded = _load(compiler)
    except subprocess.CalledProcessError as error:
        logger.warning("native kernels are off: %s could not compile them:\n%s", compiler, error.stderr.strip())
        return None
    except OSError as error:  # a full disk, or a folder that no code may run from
        logger.warning("native kernels are off: %s", error)
        return None
    # Intel's library is at home on Intel's processors. On AMD's it takes longer than our own loops.
    product, set_threads = mkl_function("sgemm_"), mkl_function("MKL_Set_Num_Threads_Local")
    if not _is_amd() and product is not None and set_threads is not None:
        functions = (ctypes.cast(function, ctypes.c_void_p) for function in (product, set_threads))
        loaded.use_mkl(*functions)
    return loaded


def call(name: str, tensors: list[Tensor | None], sizes: list[int], *reals: float) -> None:
    """Calls a function of the library, which takes its arguments in this order, and the number of threads last.

    Args:
        name: The function.
        tensors: Contiguous ones, or None where it takes none.
        sizes: Whole numbers.
        reals: Numbers in float32.
    """
    if not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"{name} takes contiguous tensors only")
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    function = _function(name, len(tensors), len(sizes), len(reals))
    function(*addresses, *sizes, *reals, torch.get_num_threads())


@torch.compiler.assume_constant_result
def num_threads() -> int:
    """PyTorch's threads of an operator, which a compiled graph takes to stay."""
    return torch.get_num_threads()


@functools.cache
def _function(name: str, pointers: int, integers: int, reals: int) -> Callable[..., None]:
    loaded = library()
    assert loaded is not None
    function = loaded[name]  # an object of its own, whose types nobody else sets
    function.argtypes = [
        *[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * integers, *[ctypes.c_float] * reals, ctypes.c_int,
    ]  # fmt: skip
    function.restype = None
    return function


def define(schema: str, run: Callable[..., object], shapes: Callable[..., object]) -> torch._ops.OpOverload:
    """An operator of PyTorch's, without a gradient of its own. `torch.library.custom_op` puts more around each call.

    Args:
        schema: Its name and signature.
        run: Computes it on a processor.
        shapes: Gives empty results, for the compiler.
    """
    name = schema.partition("(")[0]
    torch.library.define(f"{NAMESPACE}::{name}", schema.removeprefix(name))
    torch.library.impl(f"{NAMESPACE}::{name}", "cpu", run)
    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes)
    operator: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    return operator


def takes(*tensors: Tensor) -> bool:
    """Whether these are what the functions work on: float32 on a processor, not empty, in one piece, and not under AMP."""
    return not torch.is_autocast_enabled("cpu") and all(
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and type(x) in (Tensor, torch.nn.Parameter)
        for x in tensors
    )


def _load(compiler: str) -> ctypes.CDLL:
    """The library from the user's cache, compiled now where it is not there.

    Raises:
        OSError: It can be written nowhere, or not be run from there.
        subprocess.CalledProcessError: The compiler fails.
    """
    try:
        built = _cache_folder() / f"{_fingerprint(compiler)}.so"
        if not (built.exists() and _is_ours_alone(built)):
            with tempfile.TemporaryDirectory(dir=built.parent) as workplace:
                # Another process may be at the same: each puts its own in place, whole.
                os.replace(_compile(compiler, Path(workplace)), built)
        return ctypes.CDLL(str(built))
    except (
        OSError,
        RuntimeError,
    ) as error:  # no home, not ours alone, a full disk, no code to be run there, a cut file
        logger.info("native kernels are compiled for this process only: %s", error)
    with tempfile.TemporaryDirectory() as workplace:
        return ctypes.CDLL(str(_compile(compiler, Path(workplace))))


def _compile(compiler: str, folder: Path) -> Path:
    """The library, in a folder that only this user can write to."""
    built = folder / "native.so"
    sources = [str(source) for source in SOURCES if source.suffix == ".cpp"]
    subprocess.run([compiler, *FLAGS, *sources, "-o", str(built)], capture_output=True, text=True, check=True)
    built.chmod(0o700)
    return built


def _cache_folder() -> Path:
    """A folder that only this user can write to: code is run from it.

    Raises:
        OSError: It cannot be made, or others may write there.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "ultrathink-native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours_alone(folder):
        raise PermissionError(f"{folder} belongs to another user, or others may write there: `chmod 700` it")
    return folder


def _is_ours_alone(path: Path) -> bool:
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_amd() -> bool:
    """Whether this is an AMD processor."""
    return "AuthenticAMD" in _processor()


def _fingerprint(compiler: str) -> str:
    """What the compiled code follows from: sources, compiler, flags, and the processor, since a home may be shared."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [version, *FLAGS, platform.machine(), _processor(), *(source.read_text("utf-8") for source in SOURCES)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _processor() -> str:
    """What Linux says of the first processor's model and features; empty elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().partition("\n\n")[0].splitlines() if cpuinfo.exists() else []
    named = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU", "Features")
    return "\n".join(line for line in lines if line.startswith(named))
