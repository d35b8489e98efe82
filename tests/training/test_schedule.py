import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ultrathink_model.config.training import TrainingConfig
from ultrathink_model.training.schedule import learning_rate_factor, set_learning_rate


def factors(total_steps: int, **settings) -> list[float]:
    training = TrainingConfig(**settings)
    return [learning_rate_factor(training, step, total_steps) for step in range(1, total_steps + 1)]


def test_warmup_rises_in_a_straight_line_to_the_peak():
    assert factors(10, schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]


def test_cosine_passes_its_closed_form_points():
    curve = factors(104, schedule="cosine", warmup_steps=4, min_lr_ratio=0.2)
    assert curve[3] == 1.0
    assert curve[3 + 50] == pytest.approx(0.6)
    assert curve[3 + 25] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert curve[-1] == pytest.approx(0.2)


def test_linear_falls_evenly_to_its_floor():
    curve = factors(10, schedule="linear", warmup_steps=0, min_lr_ratio=0.0)
    assert curve == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


def test_wsd_holds_then_falls_over_the_last_share_of_the_run():
    curve = factors(100, schedule="wsd", warmup_steps=10, decay_fraction=0.2, min_lr_ratio=0.1)
    assert curve[9:80] == [1.0] * 71
    assert curve[89] == pytest.approx(0.55)
    assert curve[-1] == pytest.approx(0.1)


def test_wsd_decay_never_eats_into_warmup():
    curve = factors(10, schedule="wsd", warmup_steps=5, decay_fraction=1.0, min_lr_ratio=0.0)
    assert curve == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


@given(
    schedule=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    warmup_steps=st.integers(0, 30),
    total_steps=st.integers(1, 60),
    min_lr_ratio=st.floats(0, 1),
    decay_fraction=st.floats(0.01, 1),
)
def test_every_schedule_rises_to_one_peak_and_never_rises_again(
    schedule, warmup_steps, total_steps, min_lr_ratio, decay_fraction
):
    curve = factors(
        total_steps + 5,
        schedule=schedule,
        warmup_steps=warmup_steps,
        min_lr_ratio=min_lr_ratio,
        decay_fraction=decay_fraction,
    )
    assert all(0 <= factor <= 1 for factor in curve)
    rise, fall = curve[:warmup_steps], curve[warmup_steps:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert all(factor >= min_lr_ratio - 1e-12 for factor in fall)


def test_steps_past_the_planned_end_keep_the_last_rate():
    training = TrainingConfig(schedule="cosine", min_lr_ratio=0.3)
    assert learning_rate_factor(training, 25, 20) == pytest.approx(0.3)


def test_each_group_follows_its_own_peak():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weights[0]], "peak_lr": 0.5}, {"params": [weights[1]], "peak_lr": 4.0}])
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 1.0]
