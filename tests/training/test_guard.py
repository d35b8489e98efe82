import pytest
import torch
from conftest import losses
from gloo_ranks import run_ranks

from ultrathink_model.config import Config, override_config
from ultrathink_model.data import DataManifest
from ultrathink_model.tracking.metrics import read_metrics
from ultrathink_model.training.guard import StepGuard
from ultrathink_model.training.loss_scaler import FIRST_SCALE, GROWTH_STEPS, LossScaler
from ultrathink_model.training.run import train
from ultrathink_model.training.trainer import Trainer


def test_loss_scale_halves_at_bad_steps_and_doubles_after_many_good_ones():
    scaler = LossScaler(torch.device("cpu"))
    good, bad = torch.tensor(False), torch.tensor(True)
    assert float(scaler.scale(torch.tensor(1.0))) == FIRST_SCALE
    for _ in range(GROWTH_STEPS - 1):
        scaler.update(good)
    assert float(scaler.scale(torch.tensor(1.0))) == FIRST_SCALE
    scaler.update(good)
    assert float(scaler.scale(torch.tensor(1.0))) == 2 * FIRST_SCALE
    scaler.update(bad)
    scaler.update(bad)
    assert float(scaler.scale(torch.tensor(1.0))) == FIRST_SCALE / 2
    assert float(scaler.state_dict()["good_steps"]) == 0


def test_unscaling_gives_the_gradients_of_the_plain_loss():
    module = torch.nn.Linear(3, 1)
    scaler = LossScaler(torch.device("cpu"))
    x = torch.randn(5, 3)
    scaler.scale(module(x).sum()).backward()
    scaler.unscale(module)
    # The scale is a power of two, so nothing is rounded.
    assert torch.equal(module.weight.grad, torch.autograd.grad(module(x).sum(), module.weight)[0])


class PoisonedTrainer(Trainer):
    """A trainer whose gradient is not a number on one rank at step 3."""

    def forward(self, batch):
        output = super().forward(batch)
        is_poisoned = self.position.step == 2 and self.strategy.context.rank == self.strategy.context.world_size - 1
        if is_poisoned and torch.is_grad_enabled():
            output.loss_sum = output.loss_sum * torch.nan
        return output


class MaskingGuard(StepGuard):
    """The guard as it works on a GPU, where nothing may ask the device whether a step is bad."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self._masks = True


@pytest.fixture
def poisoned(monkeypatch) -> None:
    monkeypatch.setattr("ultrathink_model.training.assembly.Trainer", PoisonedTrainer)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("features", [(), ("advanced.enable_moe=true", "advanced.enable_dre=true")])
def test_a_bad_step_moves_nothing_and_training_goes_on(train_tiny, poisoned, monkeypatch, features, optimizer):
    settings = ("training.schedule=constant", "training.warmup_steps=0", *features, f"training.optimizer={optimizer}")
    result, rows = train_tiny(*settings)
    assert "train/loss" not in rows[2]
    assert [row["train/bad_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert losses(rows)[-1] < losses(rows)[0]
    monkeypatch.setattr("ultrathink_model.training.trainer.StepGuard", MaskingGuard)
    masked, masked_rows = train_tiny(*settings, folder="masked")
    assert losses(masked_rows) == losses(rows)
    assert masked.metrics["val/loss"] == result.metrics["val/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(base_config, manifest, tmp_path, strategy):
    overrides = [
        "distributed.enabled=true",
        f"distributed.strategy={strategy}",
        f"output.output_dir={tmp_path / 'run'}",
    ]
    run_ranks(2, _train_poisoned, override_config(base_config, overrides), manifest)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["train/bad_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]


def _train_poisoned(rank: int, config: Config, manifest: DataManifest) -> None:
    from ultrathink_model.training import assembly

    assembly.Trainer = PoisonedTrainer  # type: ignore[misc]
    result = train(config, manifest=manifest, run_name="tiny")
    assert result.steps == 6
