import forked_runs
import pytest
import torch
from conftest import losses

from ultrathink_model.config import override_config
from ultrathink_model.tracking.metrics import read_metrics
from ultrathink_model.training.guard import TrainingDivergedError
from ultrathink_model.training.spikes import LEAST_LOSSES, SpikeDetector
from ultrathink_model.training.trainer import Trainer

SETTINGS = (
    "training.max_steps=12",
    "training.checkpoint_steps=3",
    "training.max_bad_steps=1",
    "training.keep_checkpoints=9",
)


class BadBatches(Trainer):
    """A trainer for whom some steps of the data spoil the loss on the last rank."""

    bad = range(7, 10)
    factor = torch.nan

    def forward(self, batch):
        output = super().forward(batch)
        is_last_rank = self.strategy.context.rank == self.strategy.context.world_size - 1
        if torch.is_grad_enabled() and is_last_rank and self.position.data_step in self.bad:
            output.loss_sum = output.loss_sum * self.factor
        return output


@pytest.fixture
def bad_batches(monkeypatch) -> type[BadBatches]:
    class Own(BadBatches):
        pass

    monkeypatch.setattr("ultrathink_model.training.assembly.Trainer", Own)
    return Own


def test_too_many_bad_steps_go_back_to_the_last_good_checkpoint_and_pass_over_the_batches(
    train_tiny, bad_batches, tmp_path
):
    result, rows = train_tiny(*SETTINGS)
    assert result.steps == 12
    # Steps 8 and 9 are bad; back to the checkpoint of step 6, with the batches up to the second bad one passed over.
    # The third bad batch is met at once, and skipped by itself.
    assert [row["step"] for row in rows if "train/loss" in row or "train/bad_steps" in row] == list(range(1, 13))
    assert [row["train/bad_steps"] for row in rows] == [0] * 6 + [3] * 6
    assert [row.get("train/rollbacks", 0) for row in rows] == [0] * 6 + [1] * 6
    log = (tmp_path / "run" / "training.log").read_text()
    assert "Back to step 6, and on with the batches after the 3 steps since then (rollback 1 of 3)" in log


def test_what_was_learned_before_the_checkpoint_is_untouched(train_tiny, bad_batches, monkeypatch):
    _, rolled = train_tiny(*SETTINGS)
    monkeypatch.undo()
    _, plain = train_tiny(*SETTINGS, "training.resume=never", folder="plain")
    assert losses(rolled)[:6] == losses(plain)[:6]
    assert losses(rolled)[6:] != losses(plain)[6:]


def test_a_checkpoint_among_bad_steps_is_not_gone_back_to(train_tiny, bad_batches, tmp_path):
    bad_batches.bad = range(8, 11)  # the checkpoint of step 9 comes after the first of them
    train_tiny(*SETTINGS)
    assert "Back to step 6" in (tmp_path / "run" / "training.log").read_text()


def test_a_run_goes_back_only_so_often(train_tiny, bad_batches):
    bad_batches.bad = range(7, 99)
    with pytest.raises(TrainingDivergedError, match=r"2 steps in a row .* with 2 rollbacks behind it"):
        train_tiny(*SETTINGS, "training.max_rollbacks=2")


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(train_tiny, bad_batches):
    bad_batches.bad = range(1, 4)
    with pytest.raises(TrainingDivergedError, match="2 steps in a row up to step 3"):
        train_tiny(*SETTINGS)


def test_a_killed_run_that_went_back_does_so_again(train_tiny, bad_batches, tmp_path):
    _, rows = train_tiny(*SETTINGS)
    for step in (9, 12):
        path = tmp_path / "run" / f"checkpoint_{step:08d}.pt"
        path.rename(tmp_path / path.name)
    (tmp_path / "run" / "result.json").unlink()
    _, again = train_tiny(*SETTINGS)
    assert losses(again) == losses(rows)
    assert [row["step"] for row in again] == [row["step"] for row in rows]


def test_a_run_resumed_after_a_rollback_goes_on_with_the_same_batches(train_tiny, bad_batches, tmp_path):
    _, rows = train_tiny(*SETTINGS)
    (tmp_path / "run" / "checkpoint_00000012.pt").rename(tmp_path / "away")
    (tmp_path / "run" / "result.json").unlink()
    _, again = train_tiny(*SETTINGS)
    assert "goes on after step 9" in (tmp_path / "run" / "training.log").read_text()
    assert losses(again) == losses(rows)


def test_a_spike_is_a_bad_step_when_asked(train_tiny, bad_batches):
    bad_batches.bad, bad_batches.factor = [20], 3.0
    settings = ("training.max_steps=24", "training.schedule=constant", "training.learning_rate=1.0e-4")
    _, rows = train_tiny(*settings, "training.spike_deviations=6", folder="asked")
    assert rows[-1]["train/bad_steps"] == 1
    assert rows[20]["train/bad_steps"] == 1
    _, rows = train_tiny(*settings, folder="not_asked")
    assert rows[-1]["train/bad_steps"] == 0


def test_a_loss_far_above_the_median_is_a_spike_and_noise_is_not():
    torch.manual_seed(0)
    detector = SpikeDetector(6.0, torch.device("cpu"))
    good = torch.tensor(False)
    for number in range(200):
        loss = 4.0 + 0.1 * torch.randn(()).clamp(-3, 3)
        assert not detector.is_spike(loss)
        assert bool(detector.is_spike(torch.tensor(5.0))) == (number >= LEAST_LOSSES)
        detector.note(loss, good)
    assert not detector.is_spike(torch.tensor(torch.nan))
    before = detector.state_dict()["losses"].clone()
    detector.note(torch.tensor(9.0), torch.tensor(True))
    assert torch.equal(detector.state_dict()["losses"], before)


class Badly(forked_runs.Hook):
    """Ranks that train on bad batches."""

    def install(self, rank: int) -> None:
        from ultrathink_model.training import assembly

        assembly.Trainer = BadBatches  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_go_back_together(base_config, manifest, tmp_path, strategy):
    ranks = [f"distributed.strategy={strategy}", "distributed.enabled=true", f"output.output_dir={tmp_path / 'run'}"]
    settings = [*SETTINGS, *ranks, "training.spike_deviations=6", "training.ema_decay=0.9"]
    processes = forked_runs.start(override_config(base_config, settings), manifest, 2, Badly())
    assert forked_runs.exit_codes(processes) == [0, 0]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["train/rollbacks"] == 1
