"""`run.py doctor`: looks at the machine, the packages, the disk and the stores, and says what to mend."""

import importlib.metadata
import os
import shutil
import sqlite3
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
from packaging.requirements import InvalidRequirement, Requirement

from ultrathink_model.command_line import ArgumentParser, add_config_flags, given_config
from ultrathink_model.config import Config
from ultrathink_model.config.profiles import gpu_memory
from ultrathink_model.errors import DependencyError
from ultrathink_model.planning import make_plan
from ultrathink_model.planning.plan import GIB

PYTHONS = ((3, 11), (3, 12))
SERVER_SECONDS = 5
SIGNS = {"good": "ok  ", "note": "note", "bad": "BAD "}


class Finding(NamedTuple):
    """What one check found, and what to do about it unless it is good."""

    state: Literal["good", "note", "bad"]
    text: str
    remedy: str = ""


def make_parser() -> ArgumentParser:
    """The flags of `run.py doctor`."""
    parser = ArgumentParser(prog="run.py doctor", description=__doc__ or "")
    add_config_flags(parser)
    return parser


def main(arguments: list[str]) -> None:
    """Prints a line a finding.

    Raises:
        ConfigError: The config cannot be used.
        DependencyError: Something is bad.
    """
    given = make_parser().parse_args(arguments)
    config = given_config(given)
    bad = 0
    for check in CHECKS:
        finding = check(config)
        bad += finding.state == "bad"
        print(f"{SIGNS[finding.state]} {finding.text}")
        if finding.remedy:
            print(f"     -> {finding.remedy}")
    if bad:
        raise DependencyError(f"{bad} of {len(CHECKS)} checks found something to mend; see the lines that say BAD.")


def check_python(_config: Config) -> Finding:
    """Whether this Python is one that the packages are tested with."""
    version = sys.version_info[:2]
    text = f"Python {sys.version.split()[0]} in {sys.prefix}"
    if version in PYTHONS:
        return Finding("good", text)
    return Finding("bad", text, "make setup PYTHON=python3.11")


def check_packages(_config: Config) -> Finding:
    """Whether every package that the project needs is there, in a version that it takes."""
    try:
        needed = [text for text in importlib.metadata.requires("ultrathink-model") or [] if "extra ==" not in text]
    except importlib.metadata.PackageNotFoundError:
        return Finding("bad", "the project itself is not installed in this Python", "make setup")
    wrong = [text for text in needed if not _is_met(text)]
    if wrong:
        return Finding("bad", f"packages missing or in another version: {', '.join(wrong)}", "make setup")
    return Finding("good", f"{len(needed)} required packages are there")


def check_processor(_config: Config) -> Finding:
    """Cores, memory, and whether something else uses them."""
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    text = f"{cores} cores, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB of memory free"
    load = os.getloadavg()[0]
    if load > cores:
        return Finding("note", f"{text}, load {load:.1f}", "other work slows training on the processor many times over")
    return Finding("good", text)


def check_gpus(_config: Config) -> Finding:
    """Whether torch sees the GPUs that the driver sees."""
    driver = gpu_memory()
    if not driver:
        return Finding("good", "no NVIDIA GPU: training runs on the processor")
    import torch  # noqa: PLC0415 - takes seconds, and only where there is a GPU

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    text = f"{len(driver)} GPUs of {', '.join(f'{size:.0f}' for size in driver)} GiB, of which torch sees {seen}"
    if seen == len(driver):
        return Finding("good", text)
    remedy = f"torch {torch.__version__}: install its CUDA build, or look at CUDA_VISIBLE_DEVICES"
    return Finding("note" if seen else "bad", text, remedy)


def check_memory(config: Config) -> Finding:
    """Whether a rank of this config fits the smallest device."""
    devices = gpu_memory() or [psutil.virtual_memory().available / GIB]
    needed = make_plan(config).memory.total / GIB
    text = f"a rank of this config needs about {needed:.1f} GiB, and {min(devices):.1f} GiB are there"
    if needed < min(devices):
        return Finding("good", text)
    return Finding("bad", text, "run.py plan --device NAME says what fits; or take a smaller --profile")


def check_disk(config: Config) -> Finding:
    """Whether the checkpoints and the model fit the disk."""
    folder = _existing(Path(config.output.output_dir))
    free, needed = shutil.disk_usage(folder).free / GIB, make_plan(config).disk / GIB
    text = f"checkpoints and model take about {needed:.1f} GiB, and {free:.1f} GiB are free in {folder}"
    if not os.access(folder, os.W_OK):
        return Finding("bad", f"{folder} cannot be written to", "set output.output_dir")
    if free > needed:
        return Finding("good", text)
    return Finding("bad", text, "free some, set output.output_dir elsewhere, or lower training.keep_checkpoints")


def check_mlflow(config: Config) -> Finding:
    """Whether the MLflow store answers."""
    uri = config.logging.mlflow_tracking_uri
    if not config.logging.use_mlflow:
        return Finding("note", "logging.use_mlflow=false: runs are kept in their folders alone")
    if uri.startswith("sqlite:///"):
        return _check_database("MLflow's store", Path(uri.removeprefix("sqlite:///")))
    if not uri.startswith("http"):
        return Finding("note", f"MLflow's store {uri} was not tried")
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=SERVER_SECONDS):
            return Finding("good", f"MLflow's server answers at {uri}")
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        reason = getattr(error, "reason", error)
        remedy = "start it, or mend logging.mlflow_tracking_uri; until then metrics wait in the run's folder"
        return Finding("bad", f"MLflow's server {uri} does not answer: {reason}", remedy)


def check_zenml(_config: Config) -> Finding:
    """Whether ZenML's own store can be used."""
    import click  # noqa: PLC0415 - ZenML's, for the place of its settings

    folder = Path(os.environ.get("ZENML_CONFIG_PATH") or click.get_app_dir("zenml"))
    return _check_database("ZenML's store", folder / "local_stores" / "default_zen_store" / "zenml.db")


def check_compiler(config: Config) -> Finding:
    """Whether there is a compiler where the config needs one."""
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if found:
        return Finding("good", f"C++ compiler {found}")
    needed = config.training.compile and not gpu_memory()
    text = "no C++ compiler"
    return Finding(
        "bad" if needed else "note", text, "install g++ for training.compile=true and native_kernels on a processor"
    )


def _check_database(name: str, path: Path) -> Finding:
    if not path.exists():
        folder = _existing(path.parent)
        if os.access(folder, os.W_OK):
            return Finding("good", f"{name} will be made in {path}")
        return Finding("bad", f"{name} cannot be made in {path}", f"make {folder} writable")
    try:
        with sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=SERVER_SECONDS) as database:
            answer = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        answer = str(error)
    if answer != "ok":
        return Finding("bad", f"{name} {path} is damaged: {answer}", "move it away; it is made anew, and runs are kept")
    if not os.access(path, os.W_OK):
        return Finding("bad", f"{name} {path} cannot be written to", f"chmod u+w {path}")
    return Finding("good", f"{name} {path} is whole")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _is_met(requirement: str) -> bool:
    try:
        parsed = Requirement(requirement)
        return parsed.specifier.contains(importlib.metadata.version(parsed.name), prereleases=True)
    except (InvalidRequirement, importlib.metadata.PackageNotFoundError):
        return False


CHECKS: tuple[Callable[[Config], Finding], ...] = (
    check_python,
    check_packages,
    check_processor,
    check_gpus,
    check_memory,
    check_disk,
    check_mlflow,
    check_zenml,
    check_compiler,
)
