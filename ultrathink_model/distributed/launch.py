"""Starting the ranks of this machine from inside one process, and hearing how they ended."""

import base64
import importlib
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ultrathink_model.config import Config
from ultrathink_model.distributed import rank as rank_process
from ultrathink_model.distributed.context import strategy_name
from ultrathink_model.distributed.deepspeed_config import require_deepspeed
from ultrathink_model.distributed.rank import Outcome, outcomes
from ultrathink_model.errors import DistributedError, TrainingStoppedError, UltrathinkError

# How long ranks may take to save after a signal, or after another rank failed, before they are killed.
GRACE_SECONDS = 40

DEEPSPEED_LAUNCHER = """
import runpy
from ultrathink_model.distributed.rank import die_with_parent
die_with_parent()
runpy.run_module("deepspeed.launcher.launch", run_name="__main__")
"""

INTERRUPTED = "builtins:KeyboardInterrupt"

AGENT_LOGGERS = (
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.agent.server.api",
    "torchelastic-events-null",
)

HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class RankFailedError(RuntimeError):
    """A rank ended in an error that is not the user's; the message holds its number and its traceback."""


def launch(entry: Callable[..., Any], args: tuple[Any, ...], config: Config) -> Any:
    """Runs `entry(*args)` on every rank that a config asks for, and returns what it returned on rank 0.

    Where this process is a rank already, or the config is not distributed, it is simply called. Otherwise
    `distributed.num_processes` ranks are started, by torchrun's agent or DeepSpeed's launcher; what they print
    reaches this process's output.

    Args:
        entry: A function of a module, so that the ranks can import it.
        args: Picklable.
        config: Says whether, how many and how.

    Raises:
        UltrathinkError: What a rank raised, of the same class and with the same message; `TrainingStoppedError`
            when a signal ended the ranks.
        DistributedError: A rank was killed.
        RankFailedError: A rank raised anything else.
        DependencyError: DeepSpeed's launcher is asked for and not installed.
    """
    if "RANK" in os.environ or strategy_name(config) == "single":
        return entry(*args)
    count = rank_count(config)
    with tempfile.TemporaryDirectory(prefix="ultrathink-ranks-") as name:
        folder = Path(name)
        (folder / rank_process.PATH_FILE).write_text(json.dumps([str(Path(path).resolve()) for path in sys.path]))
        (folder / rank_process.TASK_FILE).write_bytes(pickle.dumps((entry, args)))
        start = _start_with_deepspeed if config.distributed.launcher == "deepspeed" else _start_with_torchrun
        ending = start(folder, count)
        _raise_first_failure(outcomes(folder), count, ending)
        return pickle.loads((folder / rank_process.RESULT_FILE).read_bytes())


def rank_count(config: Config) -> int:
    """`distributed.num_processes`; null is one rank per GPU, or two on a CPU."""
    if config.distributed.num_processes is not None:
        return config.distributed.num_processes
    return torch.cuda.device_count() or 2


class Ending:
    """What a launcher saw: a signal that this process was sent, or the ranks that died of one, with its name.

    Ranks that died of SIGTERM are not among them: the launcher ends the others so when one has failed.
    """

    def __init__(self, received: signal.Signals | None = None, killed: dict[int, str] | None = None) -> None:
        self.received = received
        self.killed = killed or {}


def _start_with_torchrun(folder: Path, count: int) -> Ending:
    """Runs the ranks under torchrun's agent, in this process."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std  # noqa: PLC0415
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415 - a second of imports

    # A terminal is handed on, for the live line. Anything else may stand in for sys.stdout alone (ZenML's step log,
    # a test), which child processes do not write to: their output goes through files into it.
    tee = Std.NONE if sys.stdout.isatty() else Std.ALL
    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="ultrathink",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        shutdown_timeout=GRACE_SECONDS,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs"), tee=tee),
        log_line_prefix_template="[rank ${rank}] ",
    )
    with _restored_signals(), _quiet_agent():
        try:
            elastic_launch(launch_config, sys.executable)("-u", "-m", rank_process.__name__, str(folder))
        except ChildFailedError as error:
            died = {rank: f.signal_name() for rank, f in error.failures.items() if f.exitcode < 0}
            return Ending(killed={rank: name for rank, name in died.items() if name != signal.SIGTERM.name})
        except SignalException as error:
            return Ending(received=error.sigval)
    return Ending()


def _start_with_deepspeed(folder: Path, count: int) -> Ending:
    """Runs the ranks under DeepSpeed's launcher, as a child process."""
    require_deepspeed()
    hosts = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(count))}).encode()).decode()
    command = [sys.executable, "-u", "-c", DEEPSPEED_LAUNCHER, f"--world_info={hosts}", "--node_rank=0"]
    command += ["--master_addr=127.0.0.1", f"--master_port={_free_port()}", "--quiet", "--no_local_rank", "--module"]
    command += [rank_process.__name__, str(folder)]
    inherits = sys.stdout.isatty()
    process = subprocess.Popen(
        command,
        stdout=None if inherits else subprocess.PIPE,
        stderr=None if inherits else subprocess.STDOUT,
        # Where it finds no GPU it would warn that it takes the CPU.
        env=os.environ if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu", **os.environ},
        text=True,
        errors="replace",
        start_new_session=True,
    )
    printer = threading.Thread(target=_print_lines, args=(process,), daemon=True)
    printer.start()
    with _restored_signals():
        received = _wait_and_pass_signals_on(process)
    printer.join()
    return Ending(received=received)


def _wait_and_pass_signals_on(process: subprocess.Popen[str]) -> signal.Signals | None:
    """Waits for a child; a signal that this process is sent goes to it, once."""
    received: list[signal.Signals] = []

    def pass_on(number: int, _frame: Any) -> None:
        if not received:
            process.send_signal(signal.SIGTERM)
        received.append(signal.Signals(number))

    if threading.current_thread() is threading.main_thread():
        for number in HANDLED_SIGNALS:
            signal.signal(number, pass_on)
    process.wait()
    return received[0] if received else None


def _print_lines(process: subprocess.Popen[str]) -> None:
    if process.stdout is not None:
        with process.stdout as lines:
            for line in lines:
                sys.stdout.write(line)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _restored_signals() -> Iterator[None]:
    """Puts this process's signal handlers back, which launchers replace and leave."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """Silences what torchrun's agent logs about ranks that end: it is told better by the error that we raise.

    It also never closes the files that it takes a rank's output through.
    """
    loggers = [logging.getLogger(name) for name in AGENT_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _raise_first_failure(left: dict[int, Outcome], count: int, ending: Ending) -> None:
    """Raises the error that began it: later ones are often only the others' lost connections."""
    by_time = sorted(left.values(), key=lambda outcome: outcome.time)
    refused = [outcome for outcome in by_time if outcome.kind == "refused"]
    crashed = [outcome for outcome in by_time if outcome.kind == "crashed" and outcome.error != INTERRUPTED]
    stopped = [outcome for outcome in by_time if outcome.kind == "stopped"]
    silent = sorted(set(range(count)) - set(left))
    is_done = len(left) == count and all(outcome.kind == "done" for outcome in by_time)
    if refused:
        raise _typed_error(refused[0])
    if ending.received is not None and not is_done:
        raise TrainingStoppedError(stopped[0].message if stopped else _stopped_early(ending.received))
    # A rank that the launcher killed at the end of its grace is not what began it.
    crashed_long_ago = bool(crashed) and time.time() - crashed[0].time >= GRACE_SECONDS
    if (ending.killed and not crashed_long_ago) or (silent and not crashed):
        raise DistributedError(_describe_killed(ending.killed or dict.fromkeys(silent, "")))
    if crashed:
        raise RankFailedError(f"rank {crashed[0].rank} failed:\n{crashed[0].trace}")
    if stopped:
        raise TrainingStoppedError(stopped[0].message)


def _typed_error(outcome: Outcome) -> UltrathinkError:
    module, _, name = outcome.error.partition(":")
    kind = getattr(importlib.import_module(module), name)
    assert issubclass(kind, UltrathinkError)
    return kind(outcome.message)


def _stopped_early(received: signal.Signals) -> str:
    return (
        f"stopped by {received.name} before the ranks could say that they had saved; start the same command again to "
        "go on from the last checkpoint."
    )


def _describe_killed(killed: dict[int, str]) -> str:
    ranks = ", ".join(f"rank {rank}{f' ({name})' if name else ''}" for rank, name in sorted(killed.items()))
    return (
        f"{ranks} ended without a word, as processes do that the system kills, for want of memory for one. "
        "Start the same command again to go on from the last checkpoint; if it recurs, lower training.batch_size."
    )
