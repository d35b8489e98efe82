"""Every strategy of PyTorch's trains as one process does, on the real decoder, over real ranks.

The tolerance: a loss near 5.7 is the mean of float32 sums, whose step is 5e-7 of such a mean. Ranks add in another
order than one process, in the sums and in the gradients, which costs up to two such steps, and no more over the steps
of these runs. Hence 1e-6.
"""

import pytest
import small_runs
import strategy_cases
import torch
from strategy_cases import family

from ultrathink_model.config import override_config
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.distributed.strategy import make_strategy
from ultrathink_model.errors import ConfigError, DistributedError

NAMES = [
    f"{strategy}{trained}"
    for strategy in ("ddp", "fsdp")
    for trained in ("", "_muon", "_routed", "_harm", "_media", "_mediamuon")
]

# Who loads, and who saved.
LOADS = [
    ("ddp", "ddp"),
    ("fsdp", "fsdp"),
    ("ddp", "fsdp"),
    ("fsdp_routed", "ddp_routed"),
    ("fsdp_muon", "ddp_muon"),
    ("fsdp_media", "ddp_media"),
]


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


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_have_the_losses_of_one_process_over_twenty_steps(tmp_path, ranks):
    names = ["ddp", "ddp_routed", "ddp_mixture", "ddp_muon", "fsdp", "fsdp_routed"]
    results = strategy_cases.curves_over_ranks(tmp_path, names, ranks=ranks, steps=20)
    reference = strategy_cases.run_alone(tmp_path, names, steps=20)["curves"]
    for name in names:
        strategy_cases.assert_equal_curves(results[name], reference[family(name)])


def test_strategy_outside_of_any_ranks_is_refused(tmp_path):
    config = strategy_cases.config_of(tmp_path, "fsdp", ranks=2)
    with pytest.raises(DistributedError, match=r"distributed.strategy=fsdp works among ranks"):
        make_strategy(config, RankContext(0, 0, 1, torch.device("cpu")))


@pytest.mark.parametrize("name", ["single", "ddp"])
def test_offload_that_would_have_no_effect_is_refused(name):
    overrides = ["distributed.enabled=true", f"distributed.strategy={name}", "distributed.cpu_offload=true"]
    config = override_config(strategy_cases.BASE, overrides)
    with pytest.raises(ConfigError, match=f"has no effect under distributed.strategy={name}; take fsdp or deepspeed"):
        make_strategy(config, RankContext(0, 0, 2, torch.device("cpu")))
