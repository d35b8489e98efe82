"""DeepSpeed's ZeRO, in each stage, trains as one process does, on the real decoder, over real ranks.

The tolerance: a loss near 5.7 is the mean of float32 sums, whose step is 5e-7 of such a mean. Ranks add in another
order than one process, in the sums and in the gradients, which costs up to two such steps, and no more over the steps
of these runs. Hence 1e-6, for ZeRO-3 too.
"""

import pytest
import small_runs
import strategy_cases
import torch
from strategy_cases import family

from ultrathink_model.config import override_config
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.distributed.deepspeed import DeepSpeedStrategy, import_deepspeed
from ultrathink_model.errors import ConfigError

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow


NAMES = ["zero1", "zero2", "zero2_routed", "zero3", "zero3_routed", "zero3_harm", "zero2_media", "zero3_media"]

# Who loads, and who saved.
LOADS = [("zero1", "zero1"), ("zero2", "zero1"), ("zero3", "zero2"), ("zero1", "zero3"), ("zero3", "zero3")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def two_ranks(folder):
    return strategy_cases.run_over_two_ranks(folder, NAMES, LOADS)


@pytest.fixture(scope="module")
def one_process(folder):
    return strategy_cases.run_alone(folder, NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_have_the_losses_and_weights_of_one_process(two_ranks, one_process, name):
    strategy_cases.assert_trains_alike(two_ranks["curves"][name], one_process["curves"][family(name)])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_that_is_not_finite_on_one_rank_is_forgotten_by_all(two_ranks, one_process, name):
    strategy_cases.assert_equal_curves(two_ranks["skipped"][name], one_process["curves"][family(name)])


@pytest.mark.parametrize(("by", "of"), LOADS)
def test_saved_state_goes_on_under_another_strategy_and_bitwise_under_its_own(two_ranks, by, of):
    resumed, uninterrupted = two_ranks["loaded"][by, of], two_ranks["saved"][of]
    strategy_cases.assert_equal_curves(resumed, uninterrupted)
    if by == of:
        assert resumed == uninterrupted


@pytest.mark.parametrize("name", NAMES)
def test_saved_state_goes_on_in_one_process(two_ranks, one_process, folder, name):
    resumed = small_runs.loaded_and_continued(one_process["configs"][family(name)], folder / name)
    strategy_cases.assert_equal_curves(resumed, two_ranks["saved"][name])


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_have_the_losses_of_one_process_over_twenty_steps(tmp_path, ranks):
    names = ["zero1", "zero1_routed", "zero2", "zero2_routed", "zero3", "zero3_routed"]
    results = strategy_cases.curves_over_ranks(tmp_path, names, ranks=ranks, steps=20)
    reference = strategy_cases.run_alone(tmp_path, names, steps=20)["curves"]
    for name in names:
        strategy_cases.assert_equal_curves(results[name], reference[family(name)])


def test_no_extension_is_compiled():
    import_deepspeed()
    from deepspeed.comm.torch import build_shm_op

    # It would compile one here, for a minute and more, and only where there is a compiler.
    assert build_shm_op() is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.optimizer=muon", "take training.optimizer=adamw, or distributed.strategy=fsdp"),
        ("training.amp_dtype=fp16", "take training.amp_dtype=bf16, or distributed.strategy=fsdp"),
    ],
)
def test_what_zero_cannot_do_is_refused(override, message):
    overrides = ["distributed.enabled=true", "distributed.strategy=deepspeed", "training.use_amp=true", override]
    with pytest.raises(ConfigError, match=message):
        DeepSpeedStrategy(override_config(strategy_cases.BASE, overrides), RankContext(0, 0, 2, torch.device("cpu")))
