"""Training runs in processes that are forked from one that has imported everything: they start in a moment."""

import logging
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import ultrathink_model.training.run
from ultrathink_model.config import Config
from ultrathink_model.data import DataManifest
from ultrathink_model.errors import UltrathinkError
from ultrathink_model.tracking.metrics import read_metrics

CONTEXT = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Has the process that is forked from import what the runs need, once; it looks where PYTHONPATH says alone."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    CONTEXT.set_forkserver_preload(["forked_runs"])
    forkserver.ensure_running()
    del os.environ["PYTHONPATH"]
    if before is not None:
        os.environ["PYTHONPATH"] = before


class Hook:
    """What a test changes in a rank before it trains; a module's class, so that it can be handed on."""

    def install(self, rank: int) -> None:
        """Changes it."""


def start(config: Config, manifest: DataManifest, ranks: int = 1, hook: Hook | None = None) -> list[BaseProcess]:
    """Starts the ranks of a run."""
    start_server()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_train, args=(config, manifest, rank, ranks, port, hook)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def wait_for_step(processes: list[BaseProcess], folder: Path, step: int) -> None:
    """Returns when ranks that have just been started are beyond the step; rows of runs before them do not count."""
    began, deadline = time.time(), time.monotonic() + 120
    while not any(row["step"] >= step and row["time"] > began for row in read_metrics(folder / "metrics.jsonl")):
        assert all(process.is_alive() for process in processes), [process.exitcode for process in processes]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def exit_codes(processes: list[BaseProcess], seconds: float = 120) -> list[int | None]:
    """How each rank ended; None for one that has not by then, which is killed."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    kill(processes)
    return codes


def kill(processes: list[BaseProcess]) -> None:
    """Ends what still runs."""
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def _train(config: Config, manifest: DataManifest, rank: int, ranks: int, port: int, hook: Hook | None) -> None:
    torch.set_num_threads(1)
    # As in a run of its own: loader workers are forked from the rank, and end when it is killed.
    multiprocessing.set_start_method("fork", force=True)
    logging.getLogger("ultrathink_model").setLevel(logging.ERROR)
    if ranks > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            OMP_NUM_THREADS="1",
        )
    if hook is not None:
        hook.install(rank)
    try:
        ultrathink_model.training.run.train(config, manifest=manifest, run_name="tiny")
    except UltrathinkError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(error.exit_code)
    os._exit(0)
