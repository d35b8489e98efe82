"""Whole runs over ranks that share their data: the loader, the figures, the averaged weights and the checkpoints."""

import functools

import pytest

from ultrathink_model.config import override_config
from ultrathink_model.distributed.launch import launch
from ultrathink_model.tracking.metrics import read_metrics
from ultrathink_model.training.run import train

SETTINGS = [
    "training.global_batch_size=8",
    "training.checkpoint_steps=3",
    "training.ema_decay=0.9",
    "training.spike_deviations=8",
]
OVER_TWO_RANKS = ["distributed.enabled=true", "distributed.num_processes=2", "distributed.tensor_parallel_size=2"]

# A loss near 5 is the mean of float32 sums: see tests/distributed/test_strategy.py.
TOLERANCE = 1e-6


@pytest.fixture
def trained(base_config, manifest, tmp_path):
    """Trains in a folder of the test; returns losses and counts by step."""

    def run(folder, *overrides):
        config = override_config(base_config, [*SETTINGS, f"output.output_dir={tmp_path / folder}", *overrides])
        work = functools.partial(train, config, manifest=manifest, run_name="tiny")
        if config.distributed.enabled:
            launch(work, (), config)
        else:
            work()
        rows = read_metrics(tmp_path / folder / "metrics.jsonl")
        return {row["step"]: [row[key] for key in ("train/loss", "val/loss", "tokens") if key in row] for row in rows}

    return run


def assert_alike(run, reference):
    assert run.keys() <= reference.keys()
    for step, figures in run.items():
        assert figures == pytest.approx(reference[step], abs=TOLERANCE, rel=0)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_runs_over_cut_matrices_and_in_one_process_go_on_from_each_other(trained, tmp_path, strategy):
    cut = [*OVER_TWO_RANKS, f"distributed.strategy={strategy}"]
    alone, over_ranks = trained("alone"), trained("cut", *cut)
    assert len(alone) == 6
    assert over_ranks.keys() == alone.keys()
    assert_alike(over_ranks, alone)
    resumed = trained("alone_after_cut", f"training.resume={tmp_path / 'cut' / 'checkpoint_00000003.pt'}")
    assert resumed.keys() == {4, 5, 6}
    assert_alike(resumed, alone)
    resumed = trained("cut_after_alone", f"training.resume={tmp_path / 'alone' / 'checkpoint_00000003.pt'}", *cut)
    assert resumed.keys() == {4, 5, 6}
    assert_alike(resumed, alone)
