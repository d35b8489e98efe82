"""Matrices cut over ranks train as whole ones do; the tolerance is argued in test_strategy.py.

A sum over the ranks of a row adds in another order than one product does: one more rounding of the residual stream.
"""

import pytest
import small_runs
import strategy_cases
from strategy_cases import family

from ultrathink_model.config import override_config
from ultrathink_model.distributed.context import RankContext, init_distributed
from ultrathink_model.distributed.launch import launch
from ultrathink_model.errors import ConfigError

NAMES = ["ddptp", "ddptp_routed", "ddptp_harm", "ddptp_media", "fsdptp", "fsdptp_routed"]

# Who loads, and who saved.
LOADS = [
    ("ddptp", "ddptp"),
    ("fsdptp", "fsdptp"),
    ("fsdptp", "ddptp"),
    ("ddptp", "ddp"),
    ("ddp", "fsdptp"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def two_ranks(folder):
    return strategy_cases.run_over_two_ranks(folder, [*NAMES, "ddp"], LOADS)


@pytest.fixture(scope="module")
def one_process(folder):
    return strategy_cases.run_alone(folder, NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_cut_matrices_have_the_losses_and_weights_of_one_process(two_ranks, one_process, name):
    strategy_cases.assert_trains_alike(two_ranks["curves"][name], one_process["curves"][family(name)])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_that_is_not_finite_on_one_rank_is_forgotten_by_all(two_ranks, one_process, name):
    strategy_cases.assert_equal_curves(two_ranks["skipped"][name], one_process["curves"][family(name)])


@pytest.mark.parametrize(("by", "of"), LOADS)
def test_saved_matrices_go_on_cut_and_whole(two_ranks, by, of):
    resumed, uninterrupted = two_ranks["loaded"][by, of], two_ranks["saved"][of]
    strategy_cases.assert_equal_curves(resumed, uninterrupted)
    if by == of:
        assert resumed == uninterrupted


@pytest.mark.parametrize("name", NAMES)
def test_saved_matrices_go_on_in_one_process(two_ranks, one_process, folder, name):
    resumed = small_runs.loaded_and_continued(one_process["configs"][family(name)], folder / name)
    strategy_cases.assert_equal_curves(resumed, two_ranks["saved"][name])


def test_what_one_process_saved_goes_on_cut(folder):
    saved = folder / "one"
    uninterrupted = small_runs.saved_and_continued(strategy_cases.config_of(folder, "ddptp", ranks=1), saved)
    config = strategy_cases.config_of(folder, "fsdptp", ranks=2)
    strategy_cases.assert_equal_curves(launch(small_runs.loaded_and_continued, (config, saved), config), uninterrupted)


def test_each_rank_holds_and_moves_its_share_of_the_matrices(folder):
    sizes = {}
    for name in ("ddp", "ddptp"):
        config = strategy_cases.config_of(folder, name, ranks=2)
        sizes[name] = launch(small_runs.held_elements, (config,), config)
    # Two blocks of (4 + 2 · 2 + 4) heads of 8 by 32, and 3 · 64 by 32.
    matrices = 2 * (12 * 8 * 32 + 3 * 64 * 32)
    assert sizes["ddp"]["weights"] - sizes["ddptp"]["weights"] == matrices / 2
    assert sizes["ddp"]["optimizer"] - sizes["ddptp"]["optimizer"] == 2 * matrices / 2


@pytest.mark.slow
def test_rows_of_two_and_of_four_have_the_losses_of_one_process_over_twenty_steps(tmp_path):
    names = ["ddptp", "ddptp_mixture", "fsdptp", "ddptp4_heads", "fsdptp4_heads"]
    results = strategy_cases.curves_over_ranks(tmp_path, names, ranks=4, steps=20)
    reference = strategy_cases.run_alone(tmp_path, names, steps=20)["curves"]
    for name in names:
        strategy_cases.assert_equal_curves(results[name], reference[family(name)])


def test_ranks_of_a_row_take_the_same_data():
    contexts = [RankContext(rank, rank, 4, "cpu", tensor_parallel_size=2) for rank in range(4)]
    assert [context.data_rank for context in contexts] == [0, 0, 1, 1]
    assert [context.first_of_row for context in contexts] == [0, 0, 2, 2]
    assert contexts[0].data_ranks == 2


def test_ranks_that_make_no_whole_rows_are_refused(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    config = override_config(strategy_cases.BASE, ["distributed.enabled=true", *strategy_cases.TENSOR])
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=2 does not divide the 3 ranks"):
        init_distributed(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distributed.enabled=false"], "needs distributed.enabled=true"),
        (
            ["distributed.strategy=deepspeed"],
            "needs distributed.strategy ddp or fsdp, and distributed.strategy=deepspeed",
        ),
        (["distributed.strategy=single"], "needs distributed.strategy ddp or fsdp, and distributed.strategy=single"),
        (["distributed.num_processes=3"], "does not divide distributed.num_processes=3"),
        (["distributed.deepspeed_config=zero.json"], "ddp or fsdp, and distributed.deepspeed_config=zero.json"),
        (["distributed.launcher=deepspeed"], "ddp or fsdp, and distributed.launcher=deepspeed"),
        (["distributed.strategy=fsdp", "distributed.cpu_offload=true"], "set distributed.cpu_offload=false"),
        (["distributed.tensor_parallel_size=4"], "does not divide model.num_kv_heads=2"),
        (["model.intermediate_size=63"], "does not divide the feed-forward's 63 units"),
        (["training.optimizer=muon"], "training.optimizer=muon moves whole; take training.optimizer=adamw"),
        (["distributed.expert_parallel_size=2", *strategy_cases.MIXTURE], "cannot be used together"),
        (["advanced.enable_rlhf=true", "rlhf.prompt_tokens=8", "rlhf.response_tokens=8"], "not available to alignment"),
    ],
)
def test_what_cannot_be_cut_is_refused(overrides, message):
    cut = ["distributed.enabled=true", *strategy_cases.TENSOR]
    with pytest.raises(ConfigError, match=message):
        override_config(strategy_cases.BASE, [*cut, *overrides])
