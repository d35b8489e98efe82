import pytest

from ultrathink_model.alignment.kl_control import AIM, KLControl
from ultrathink_model.alignment.update import KLLimit
from ultrathink_model.config.rlhf import RLHFConfig


def test_weight_follows_the_published_rule():
    control = KLControl(weight=0.1, aim=4.0, horizon=100)
    control.update(kl=4.4, rollouts=50)
    assert control.weight == pytest.approx(0.1 * (1 + 0.1 * 50 / 100))
    control.update(kl=40.0, rollouts=50)  # the error is held at 0.2
    assert control.weight == pytest.approx(0.1 * 1.05 * 1.1)
    control.update(kl=0.0, rollouts=50)
    assert control.weight == pytest.approx(0.1 * 1.05 * 1.1 * 0.9)


def test_weight_stays_where_it_is_not_adaptive():
    control = KLControl.from_config(RLHFConfig(adaptive_kl=False, kl_weight=0.3))
    control.update(kl=100.0, rollouts=1000)
    assert control.weight == 0.3


def test_control_aims_below_the_bound():
    assert KLControl.from_config(RLHFConfig(target_kl=8.0)).aim == AIM * 8 < 8


def test_control_brings_a_drifting_kl_back():
    # A plant whose KL rises by a nat a round and falls in proportion to the weight.
    control, kl = KLControl(weight=0.01, aim=3.0, horizon=64), 0.0
    for _ in range(300):
        kl = max(0.0, kl + 1 - 10 * control.weight * kl)
        control.update(kl, rollouts=32)
    assert kl == pytest.approx(3.0, rel=0.1)


def test_updates_stop_beyond_the_aim_but_may_come_back_from_there():
    inside = KLLimit(start=1.0, aim=3.0)
    assert not inside.is_passed(1.9)
    assert inside.is_passed(2.1)
    outside = KLLimit(start=5.0, aim=3.0)
    assert not outside.is_passed(0.0)
    assert not outside.is_passed(-0.5)
    assert outside.is_passed(0.1)
