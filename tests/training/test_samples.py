import json

import forked_runs
import pytest
from conftest import losses

from ultrathink_model.config import override_config

SETTINGS = ("evaluation.sample_steps=2", "evaluation.num_generations=2", "evaluation.generation_tokens=4")


def test_samples_come_every_so_many_steps_from_the_same_prompts_and_leave_the_run_alone(train_tiny, tmp_path):
    routed = ("advanced.enable_moe=true", "moe.router_jitter=0.1")
    _, plain = train_tiny(*routed, folder="plain")
    _, rows = train_tiny(*routed, *SETTINGS)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [2, 2, 4, 4, 6, 6]
    assert samples[0]["prompt"] == samples[2]["prompt"]
    assert losses(rows) == losses(plain)
    assert not (tmp_path / "plain" / "samples.jsonl").exists()


def test_a_resumed_run_writes_the_samples_of_a_step_once(train_tiny, tmp_path):
    settings = (*SETTINGS, "training.checkpoint_steps=3", "training.keep_checkpoints=9")
    train_tiny(*settings)
    before = (tmp_path / "run" / "samples.jsonl").read_text()
    (tmp_path / "run" / "checkpoint_00000006.pt").rename(tmp_path / "away")
    (tmp_path / "run" / "result.json").unlink()
    train_tiny(*settings)
    assert (tmp_path / "run" / "samples.jsonl").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_sample_together(base_config, manifest, tmp_path, strategy):
    ranks = [f"distributed.strategy={strategy}", "distributed.enabled=true", f"output.output_dir={tmp_path / 'run'}"]
    processes = forked_runs.start(override_config(base_config, [*SETTINGS, *ranks]), manifest, 2)
    assert forked_runs.exit_codes(processes) == [0, 0]
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 6
