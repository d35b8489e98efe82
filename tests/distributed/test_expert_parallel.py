"""Experts cut over ranks train as whole ones do; the tolerance is argued in test_strategy.py."""

import pytest
import small_runs
import strategy_cases
from strategy_cases import family

from ultrathink_model.config import override_config
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.distributed.expert_parallel import ExpertParallel
from ultrathink_model.errors import ConfigError

NAMES = ["ddpcut_mixture", "ddpcut_muonmixture", "fsdpcut_mixture"]
OVER_RANKS = ["ddp_mixture", "ddp_capacity", "ddpcut_capacity"]

# Who loads, and who saved.
LOADS = [
    ("ddpcut_mixture", "ddpcut_mixture"),
    ("ddpcut_mixture", "ddp_mixture"),
    ("ddp_mixture", "fsdpcut_mixture"),
    ("fsdpcut_mixture", "ddpcut_mixture"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def two_ranks(folder):
    return strategy_cases.run_over_two_ranks(folder, NAMES + OVER_RANKS, LOADS)


@pytest.fixture(scope="module")
def one_process(folder):
    return strategy_cases.run_alone(folder, NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_cut_experts_have_the_losses_and_weights_of_one_process(two_ranks, one_process, name):
    strategy_cases.assert_trains_alike(two_ranks["curves"][name], one_process["curves"][family(name)])


def test_cut_experts_drop_the_copies_that_whole_ones_drop(two_ranks):
    strategy_cases.assert_trains_alike(two_ranks["curves"]["ddpcut_capacity"], two_ranks["curves"]["ddp_capacity"])
    assert two_ranks["curves"]["ddp_capacity"]["losses"] != two_ranks["curves"]["ddp_mixture"]["losses"]


@pytest.mark.parametrize("name", NAMES)
def test_gradient_that_is_not_finite_on_one_rank_is_forgotten_by_all(two_ranks, one_process, name):
    strategy_cases.assert_equal_curves(two_ranks["skipped"][name], one_process["curves"][family(name)])


@pytest.mark.parametrize(("by", "of"), LOADS)
def test_saved_experts_go_on_cut_and_whole(two_ranks, by, of):
    resumed, uninterrupted = two_ranks["loaded"][by, of], two_ranks["saved"][of]
    strategy_cases.assert_equal_curves(resumed, uninterrupted)
    if by == of:
        assert resumed == uninterrupted


def test_saved_experts_go_on_in_one_process(two_ranks, one_process, folder):
    resumed = small_runs.loaded_and_continued(one_process["configs"]["mixture"], folder / "ddpcut_mixture")
    strategy_cases.assert_equal_curves(resumed, two_ranks["saved"]["ddpcut_mixture"])


@pytest.mark.slow
def test_two_rows_of_cut_experts_have_the_losses_of_one_process_over_twenty_steps(tmp_path):
    results = strategy_cases.curves_over_ranks(tmp_path, NAMES, ranks=4, steps=20)
    reference = strategy_cases.run_alone(tmp_path, NAMES, steps=20)["curves"]
    for name in NAMES:
        strategy_cases.assert_equal_curves(results[name], reference[family(name)])


def test_ranks_that_make_no_whole_rows_are_refused():
    with pytest.raises(ConfigError, match=r"expert_parallel_size=2 does not divide the 3 ranks"):
        ExpertParallel(2, RankContext(0, 0, 3, "cpu"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["advanced.enable_moe=false"], "needs advanced.enable_moe and distributed.enabled"),
        (
            ["distributed.strategy=deepspeed"],
            "needs distributed.strategy ddp or fsdp, and distributed.strategy=deepspeed",
        ),
        (["distributed.launcher=deepspeed"], "ddp or fsdp, and distributed.launcher=deepspeed"),
        (["distributed.expert_parallel_size=3"], "does not divide the 8 experts"),
        (["advanced.enable_rlhf=true", "rlhf.prompt_tokens=8", "rlhf.response_tokens=8"], "not available to alignment"),
        (["advanced.enable_dre=true", "dre.layer_frequency=2"], "block 2, which is routed in depth too"),
    ],
)
def test_what_cannot_be_cut_is_refused(overrides, message):
    cut = ["distributed.enabled=true", *strategy_cases.CUT]
    with pytest.raises(ConfigError, match=message):
        override_config(strategy_cases.BASE, [*cut, *overrides])
