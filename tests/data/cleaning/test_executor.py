"""Cleaning beyond processes of this machine: Ray, and Slurm with stand-ins for its commands."""

import json
import logging
import os
import sys
from pathlib import Path

import pytest
from cleaned_texts import content

from ultrathink_model.data.cleaning import executor, extract
from ultrathink_model.errors import DataError, DependencyError

ON_SLURM = ("data.executor=slurm", "data.executor_workers=2", "data.slurm_partition=cpu", "data.slurm_time=01:30:00")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm's commands on PATH; gives the folder where they keep the jobs."""
    commands, spool = tmp_path / "bin", tmp_path / "spool"
    commands.mkdir()
    spool.mkdir()
    program = Path(__file__).with_name("fake_slurm.py").read_text()
    for name in ("sbatch", "squeue", "srun", "scontrol"):
        (commands / name).write_text(f"#!{sys.executable}\n{program}")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_SLURM_SPOOL", str(spool))
    monkeypatch.setattr(executor, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(extract, "TASK_CHARACTERS", 150_000)
    return spool


def jobs(spool):
    """What each job asked for, and how its tasks ended."""
    numbers = sorted(int(path.stem) for path in spool.glob("*.json"))
    return [
        (json.loads((spool / f"{number}.json").read_text()), json.loads((spool / f"{number}.done").read_text()))
        for number in numbers
    ]


@pytest.mark.slow
def test_slurm_jobs_give_byte_for_byte_what_the_local_executor_gives(prepare, copies, slurm, tmp_path):
    parts = ("cleaning.repair=true", "cleaning.exact_dedup=true")
    local, _ = prepare(copies, *parts)
    spread, _ = prepare(copies, *parts, *ON_SLURM, f"data.cache_dir={tmp_path / 'slurm'}")
    assert content(spread) == content(local)
    # The parts that look at one document, signatures, finding and removing.
    assert [(asked["array"], codes) for asked, codes in jobs(slurm)] == [
        ("0-1%2", [0, 0]),
        ("0-1%2", [0, 0]),
        ("0-0%1", [0]),
        ("0-1%2", [0, 0]),
    ]


def test_slurm_jobs_ask_for_the_partition_and_time_of_the_config_and_their_failure_is_told(
    prepare, speeches, slurm, monkeypatch
):
    monkeypatch.setenv("FAKE_SLURM_FAILS", "1")
    with pytest.raises(
        DataError, match=r"2 of 2 cleaning tasks failed under data\.executor=slurm; see .*task_00000\.log"
    ):
        prepare(speeches, "cleaning.repair=true", *ON_SLURM)
    [(asked, codes)] = jobs(slurm)
    assert codes == [1, 1]
    assert (asked["partition"], asked["time"], asked["array"]) == ("cpu", "01:30:00", "0-1%2")
    assert "qos" not in asked


def test_a_job_that_cannot_be_started_on_ray_ends_the_wait_with_its_reason(caplog):
    from concurrent.futures import Future, ThreadPoolExecutor

    started: Future = Future()
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.ERROR, "ultrathink_model"):
        pool.submit(lambda: 1 / 0).add_done_callback(lambda thread: executor._pass_on_error(started, thread))
    with pytest.raises(ZeroDivisionError):
        started.result(timeout=0)
    assert "a job could not be started: ZeroDivisionError" in caplog.text


def test_a_ray_cluster_that_is_not_there_is_told(prepare, speeches, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    with pytest.raises(DependencyError, match=r"data\.executor=ray: no cluster was to be had .*RAY_ADDRESS"):
        prepare(speeches, "cleaning.repair=true", "data.executor=ray")


@pytest.mark.slow
# datatrove names the placement group of its jobs in a way that Ray discourages; an error there ends the job.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
# Ray leaves the sockets of the cluster that it ends to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ray_with_two_workers_gives_byte_for_byte_what_the_local_executor_gives(prepare, copies, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(extract, "TASK_CHARACTERS", 150_000)
    parts = [f"cleaning.{part}=true" for part in ("repair", "mask_pii", "exact_dedup", "minhash_dedup")]
    local, _ = prepare(copies, *parts)
    spread = ("data.executor=ray", "data.executor_workers=2", f"data.cache_dir={tmp_path / 'ray'}")
    ray, _ = prepare(copies, *parts, *spread)
    assert content(ray) == content(local)
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ
