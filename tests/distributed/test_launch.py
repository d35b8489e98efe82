import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launched
import psutil
import pytest

from ultrathink_model.config import override_config
from ultrathink_model.distributed.context import init_distributed, strategy_name
from ultrathink_model.distributed.launch import RankFailedError, launch, rank_count
from ultrathink_model.errors import CheckpointError, ConfigError, DistributedError, TrainingStoppedError

# A parent process of its own, so that a signal can be sent to it: it exits as the command line does.
PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
import launched
from ultrathink_model.config import make_config
from ultrathink_model.distributed.launch import launch
from ultrathink_model.errors import UltrathinkError
config = make_config({}, ["distributed.enabled=true", f"distributed.launcher={sys.argv[2]}"])
try:
    launch(getattr(launched, sys.argv[3]), tuple(eval(text) for text in sys.argv[4:]), config)
except UltrathinkError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def distributed_config(tiny_config):
    return override_config(tiny_config, ["distributed.enabled=true", "distributed.num_processes=2"])


def start_parent(entry, *args, launcher="torchrun"):
    command = [sys.executable, "-c", PARENT, str(Path(__file__).parent), launcher, entry, *map(repr, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_ranks(folder):
    files = [folder / f"ready_{rank}" for rank in range(2)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def is_running(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_one_process_is_called_in_place(tiny_config):
    def local_function(value):
        return value, os.getpid()

    assert launch(local_function, (3,), tiny_config) == (3, os.getpid())


def test_process_that_is_a_rank_already_starts_no_others(distributed_config, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert launch(os.getpid, (), distributed_config) == os.getpid()


def test_ranks_exchange_return_and_print(distributed_config, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    result = launch(launched.exchange, (distributed_config, "given"), distributed_config)
    cores = len(os.sched_getaffinity(0))
    assert result == {
        "value": "given",
        "total": 3.0,
        "broadcast": "from 0",
        "world_size": 2,
        "is_main": True,
        "threads": max(1, cores // 2),
    }
    printed = capsys.readouterr()
    assert {"[rank 0] output of rank 0", "[rank 1] output of rank 1"} <= set(printed.out.splitlines())
    assert {"[rank 0] errors of rank 0", "[rank 1] errors of rank 1"} <= set(printed.err.splitlines())
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_would_abort_the_end_of_a_finished_rank_is_not_taken_for_a_failure(distributed_config):
    assert launch(launched.leave_what_aborts_a_teardown, (), distributed_config) == "done"


def test_typed_error_of_a_rank_comes_out_as_it_was(distributed_config, capfd):
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"^rank 1 cannot read the checkpoint$"):
        launch(launched.refuse_on_rank_1, (), distributed_config)
    assert time.monotonic() - started < 40
    assert "Traceback" not in "".join(capfd.readouterr())


def test_bug_on_a_rank_names_the_rank_and_shows_its_traceback(distributed_config):
    with pytest.raises(RankFailedError, match=r"rank 1 failed:\n(.*\n)*.*crash_on_rank_1(.*\n)*.*a bug on rank 1"):
        launch(launched.crash_on_rank_1, (), distributed_config)


def test_killed_rank_ends_the_others_and_is_named(distributed_config):
    started = time.monotonic()
    with pytest.raises(DistributedError, match=r"rank 1 \(SIGKILL\) ended without a word"):
        launch(launched.be_killed_on_rank_1, (), distributed_config)
    assert time.monotonic() - started < 40


def test_ranks_that_stop_by_themselves_wait_for_each_other(distributed_config):
    with pytest.raises(TrainingStoppedError, match="stopped at step 7, saved"):
        launch(launched.stop_by_itself, (), distributed_config)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_all_ranks_save_and_exits_with_75(tmp_path, number):
    parent = start_parent("stop_when_asked", str(tmp_path), 2.0)
    wait_for_ranks(tmp_path)
    parent.send_signal(number)
    out, err = parent.communicate(timeout=60)
    assert parent.returncode == 75, err
    assert {path.name for path in tmp_path.glob("saved_*")} == {"saved_0", "saved_1"}
    assert "stopped at step 7, saved" in out
    assert "Traceback" not in err


def test_ranks_die_with_the_process_that_started_them(tmp_path):
    parent = start_parent("wait_for_ever", str(tmp_path))
    pids = wait_for_ranks(tmp_path)
    parent.kill()
    parent.communicate()
    wait_until(lambda: not any(is_running(pid) for pid in pids), seconds=10)


@pytest.mark.slow
def test_deepspeed_launcher_runs_ranks_and_passes_signals_and_errors_on(distributed_config, tmp_path):
    pytest.importorskip("deepspeed")
    config = override_config(distributed_config, ["distributed.launcher=deepspeed"])
    assert launch(launched.exchange, (config, "given"), config)["total"] == 3.0
    with pytest.raises(CheckpointError, match=r"^rank 1 cannot read the checkpoint$"):
        launch(launched.refuse_on_rank_1, (), config)
    with pytest.raises(RankFailedError, match="rank 1 failed"):
        launch(launched.crash_on_rank_1, (), config)
    parent = start_parent("stop_when_asked", str(tmp_path), 0.0, launcher="deepspeed")
    wait_for_ranks(tmp_path)
    parent.send_signal(signal.SIGTERM)
    out, err = parent.communicate(timeout=60)
    assert parent.returncode == 75, err
    assert "stopped at step 7, saved" in out


def test_several_ranks_of_a_config_that_is_not_distributed_are_refused(tiny_config, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"4 ranks were started.*distributed.enabled=true"):
        init_distributed(tiny_config)


def test_strategy_left_open_follows_from_the_launcher(tiny_config):
    assert strategy_name(tiny_config) == "single"
    names = {
        "distributed.launcher=torchrun": "ddp",
        "distributed.launcher=deepspeed": "deepspeed",
        "distributed.deepspeed_config=configs/deepspeed_z3.json": "deepspeed",
        "distributed.strategy=fsdp": "fsdp",
    }
    for override, name in names.items():
        assert strategy_name(override_config(tiny_config, ["distributed.enabled=true", override])) == name


def test_number_of_ranks_is_the_configs_or_follows_from_the_hardware(distributed_config):
    three = override_config(distributed_config, ["distributed.num_processes=3"])
    assert rank_count(three) == 3
    import torch

    assert rank_count(override_config(three, ["distributed.num_processes=null"])) == (torch.cuda.device_count() or 2)
