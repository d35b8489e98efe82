"""Each key of the section `training` changes what a run does, or is shown elsewhere to do what it says."""

import logging
from pathlib import Path

import pytest
import torch
from conftest import losses

from ultrathink_model.config.training import TrainingConfig
from ultrathink_model.training import rng
from ultrathink_model.training.callbacks.evaluation import EvaluationCallback

# Settings that the key needs to matter, and the setting whose effect on the losses is asked for.
CHANGES_THE_LOSSES = {
    "batch_size": ((), "training.batch_size=2"),
    "gradient_accumulation_steps": ((), "training.gradient_accumulation_steps=2"),
    "global_batch_size": ((), "training.global_batch_size=8"),
    "learning_rate": ((), "training.learning_rate=5.0e-3"),
    "muon_learning_rate": (("training.optimizer=muon",), "training.muon_learning_rate=0.01"),
    "optimizer": ((), "training.optimizer=muon"),
    "weight_decay": ((), "training.weight_decay=0.5"),
    "adam_beta1": ((), "training.adam_beta1=0.5"),
    "adam_beta2": ((), "training.adam_beta2=0.5"),
    "adam_eps": ((), "training.adam_eps=1.0e-3"),
    "muon_momentum": (("training.optimizer=muon",), "training.muon_momentum=0.5"),
    "schedule": ((), "training.schedule=constant"),
    "warmup_steps": ((), "training.warmup_steps=4"),
    "min_lr_ratio": ((), "training.min_lr_ratio=0.9"),
    "decay_fraction": (("training.schedule=wsd",), "training.decay_fraction=0.5"),
    "gradient_clipping": ((), "training.gradient_clipping=0.01"),
    "use_amp": ((), "training.use_amp=true"),
    "amp_dtype": (("training.use_amp=true", "training.max_bad_steps=99"), "training.amp_dtype=fp16"),
    "z_loss_weight": ((), "training.z_loss_weight=0.1"),
    "seed": ((), "training.seed=43"),
    "first_seq_length": (
        ("training.first_seq_length=16", "training.seq_length_steps=4"),
        "training.first_seq_length=8",
    ),
    "seq_length_steps": (
        ("training.first_seq_length=16", "training.seq_length_steps=4"),
        "training.seq_length_steps=2",
    ),
}

# Keys that must leave the losses as they are, with the test that shows what they do.
SHOWN_ELSEWHERE = {
    "num_epochs": "test_training_run: test_each_bound_ends_the_run_and_the_first_one_counts",
    "max_steps": "the same",
    "max_tokens": "the same",
    "max_seconds": "test_training_run: test_max_seconds_ends_the_run",
    "resume": "test_resume",
    "checkpoint_steps": "test_training_run: test_checkpoints_come_by_steps_or_epochs_and_the_newest_are_kept",
    "keep_checkpoints": "the same",
    "max_bad_steps": "test_training_run: test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run",
    "compile": "test_training_run: test_compiled_blocks_give_the_eager_losses",
    "native_kernels": "test_training_run: test_kernels_are_native_unless_the_config_says_otherwise",
    "async_checkpoints": "test_checkpoint_writer",
    "on_save_failure": "test_save_failures",
    "keep_best": "test_retention",
    "best_metric": "test_retention",
    "keep_every": "test_retention",
    "ema_decay": "test_averaging",
    "max_rollbacks": "test_rollback",
    "spike_deviations": "test_rollback",
    "gc_steps": "test_garbage",
    "deterministic": "test_deterministic_asks_for_repeatable_kernels_while_it_trains",
    "loss_chunk_size": "tests/models: the chunked loss equals the plain one",
}


def test_every_key_of_the_section_is_accounted_for():
    assert set(TrainingConfig.model_fields) == CHANGES_THE_LOSSES.keys() | SHOWN_ELSEWHERE.keys()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("key", CHANGES_THE_LOSSES)
def test_key_changes_what_is_learned(train_tiny, key):
    base, change = CHANGES_THE_LOSSES[key]
    before = losses(train_tiny("training.max_steps=4", *base, folder="before")[1])
    after = losses(train_tiny("training.max_steps=4", *base, change, folder="after")[1])
    assert after != before


def test_the_same_seed_gives_bitwise_the_same_run(train_tiny):
    first, _ = train_tiny("advanced.enable_moe=true", "moe.router_jitter=0.1", folder="first")
    second, _ = train_tiny("advanced.enable_moe=true", "moe.router_jitter=0.1", folder="second")
    weights = "model.safetensors"
    assert (Path(first.final_model) / weights).read_bytes() == (Path(second.final_model) / weights).read_bytes()


def test_z_loss_is_logged_apart_from_the_loss(train_tiny):
    plain = train_tiny("training.max_steps=1", folder="plain")[1]
    with_z = train_tiny("training.max_steps=1", "training.z_loss_weight=0.1", folder="z")[1]
    assert with_z[0]["train/loss"] == pytest.approx(plain[0]["train/loss"], abs=1e-6)
    # The log-partition of 300 logits near zero is about log 300.
    assert with_z[0]["train/aux/z_loss"] == pytest.approx(0.1 * 5.70**2, rel=0.02)


def test_clipping_bounds_the_step_and_the_norm_is_logged_before_it(train_tiny):
    free = train_tiny("training.max_steps=1", "training.gradient_clipping=null", folder="free")[1]
    clipped = train_tiny("training.max_steps=1", "training.gradient_clipping=0.01", folder="clipped")[1]
    assert clipped[0]["train/grad_norm"] == free[0]["train/grad_norm"] > 0.01


def test_deterministic_asks_for_repeatable_kernels_while_it_trains(train_tiny, monkeypatch):
    asked = []
    finish = EvaluationCallback.on_finish
    monkeypatch.setattr(
        EvaluationCallback,
        "on_finish",
        lambda *arguments: (asked.append(torch.are_deterministic_algorithms_enabled()), finish(*arguments)),
    )
    train_tiny("training.max_steps=1", folder="loose")
    train_tiny("training.max_steps=1", "training.deterministic=true", folder="strict")
    assert asked == [False, True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_log_level_decides_what_the_log_holds(train_tiny, tmp_path):
    train_tiny("training.max_steps=1", folder="talkative")
    train_tiny("training.max_steps=1", "logging.log_level=ERROR", folder="quiet")
    assert "wrote" in (tmp_path / "talkative" / "training.log").read_text()
    assert (tmp_path / "quiet" / "training.log").read_text() == ""
    assert logging.getLogger("ultrathink_model").handlers == []


def test_generators_go_on_where_they_were_saved():
    cpu = torch.device("cpu")
    rng.seed_generators(5, rank=1)
    torch.rand(3)
    state = rng.generator_state(cpu)
    expected = torch.rand(4)
    rng.seed_generators(6, rank=0)
    rng.restore_generators(state, cpu)
    assert torch.equal(torch.rand(4), expected)


def test_ranks_draw_different_numbers_from_one_seed():
    rng.seed_generators(5, rank=0)
    first = torch.rand(4)
    rng.seed_generators(5, rank=1)
    assert not torch.equal(torch.rand(4), first)
