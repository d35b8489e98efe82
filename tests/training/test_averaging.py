import shutil
from pathlib import Path

import forked_runs
import pytest
import torch
from conftest import losses
from safetensors.torch import load_file

from ultrathink_model.config import override_config
from ultrathink_model.tracking.metrics import read_metrics
from ultrathink_model.training.averaging import WeightAverage

WEIGHTS = "model.safetensors"


class OneWeight(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(3))


class InPlace:
    """As much of a strategy as an average asks for."""

    name = "single"

    def __init__(self) -> None:
        self.unwrapped = OneWeight()

    def to_saved(self, name, tensor):
        return tensor


def test_the_average_follows_its_formula_and_stands_still_at_bad_steps():
    strategy = InPlace()
    average = WeightAverage(strategy, decay=0.9)
    weight, expected = strategy.unwrapped.w, torch.zeros(3)
    for step in range(1, 120):
        bad = torch.tensor(step % 7 == 0)
        with torch.no_grad():
            weight.copy_(torch.tensor([1.0, step, -step]))
        average.update(step, bad)
        if not bad:
            decay = min(0.9, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * weight.detach()
    assert torch.allclose(average.state_dict()["w"], expected, rtol=1e-5)


def test_the_model_holds_the_average_only_while_asked():
    strategy = InPlace()
    average = WeightAverage(strategy, decay=0.5)
    with torch.no_grad():
        strategy.unwrapped.w.fill_(4.0)
    with average.in_place():
        assert torch.equal(strategy.unwrapped.w, torch.zeros(3))
    assert torch.equal(strategy.unwrapped.w, torch.full((3,), 4.0))
    assert torch.equal(average.state_dict()["w"], torch.zeros(3))


def test_evaluation_and_the_final_model_take_the_average_and_training_does_not_see_it(train_tiny):
    plain, plain_rows = train_tiny("evaluation.eval_steps=3", folder="plain")
    averaged, rows = train_tiny("evaluation.eval_steps=3", "training.ema_decay=0.9", folder="averaged")
    assert losses(rows) == losses(plain_rows)
    assert [row["val/loss"] for row in rows if "val/loss" in row] != [
        row["val/loss"] for row in plain_rows if "val/loss" in row
    ]
    one, other = (load_file(Path(result.final_model) / WEIGHTS) for result in (plain, averaged))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_average_is_bitwise_the_uninterrupted_one(train_tiny, tmp_path):
    settings = ("training.ema_decay=0.8", "training.checkpoint_steps=3", "training.keep_checkpoints=9")
    result, rows = train_tiny(*settings)
    before = (Path(result.final_model) / WEIGHTS).read_bytes()
    for name in ("checkpoint_00000006.pt", "final_model"):
        shutil.rmtree(tmp_path / "run" / name)
    again, again_rows = train_tiny(*settings)
    assert (Path(again.final_model) / WEIGHTS).read_bytes() == before
    assert [row.get("val/loss") for row in again_rows] == [row.get("val/loss") for row in rows]


def test_an_average_asked_for_at_a_resume_begins_at_the_weights_of_the_checkpoint(train_tiny, tmp_path):
    train_tiny("training.checkpoint_steps=6", folder="plain")
    path = tmp_path / "plain" / "checkpoint_00000006.pt"
    settings = ("training.max_steps=7", f"training.resume={path}", "training.schedule=constant")
    result, _ = train_tiny(*settings, "training.ema_decay=0.999999", "training.learning_rate=1.0e-9", folder="later")
    averaged = load_file(Path(result.final_model) / WEIGHTS)
    before = load_file(tmp_path / "plain" / "final_model" / WEIGHTS)
    assert all(torch.allclose(averaged[name], before[name], atol=1e-7) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_average_as_one_process_does(train_tiny, base_config, manifest, tmp_path, strategy):
    settings = ["training.ema_decay=0.9", "training.global_batch_size=8", "training.batch_size=2"]
    alone, rows = train_tiny(*settings, "evaluation.eval_steps=3", folder="alone")
    ranks = [f"distributed.strategy={strategy}", "distributed.enabled=true", f"output.output_dir={tmp_path / 'two'}"]
    config = override_config(base_config, [*settings, "evaluation.eval_steps=3", *ranks])
    assert forked_runs.exit_codes(forked_runs.start(config, manifest, 2)) == [0, 0]
    one, two = load_file(Path(alone.final_model) / WEIGHTS), load_file(tmp_path / "two" / "final_model" / WEIGHTS)
    # Adam divides by the root of a small square: what ranks round differently weighs a little more in the weights.
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    values = [row["val/loss"] for row in rows if "val/loss" in row]
    found = [row["val/loss"] for row in read_metrics(tmp_path / "two" / "metrics.jsonl") if "val/loss" in row]
    assert found == pytest.approx(values, abs=1e-5)
