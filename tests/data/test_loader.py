import json
import pickle
from itertools import islice

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ultrathink_model.config import override_config
from ultrathink_model.data import (
    Tokenizer,
    TrainLoader,
    ValidationLoader,
    accumulation_steps,
    global_batch_size,
    prepare_data,
)
from ultrathink_model.errors import ConfigError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def dummy(tiny_config, cache):
    config = override_config(tiny_config, [f"data.cache_dir={cache}"])
    return prepare_data(config), config


def rows(manifest, config, steps, first_step=0, world_size=1):
    """The input rows of some steps, in the order of their global positions."""
    found = []
    loaders = [
        iter(TrainLoader(manifest, config, rank=rank, world_size=world_size, first_step=first_step))
        for rank in range(world_size)
    ]
    for _ in range(steps):
        micro_batches = zip(*[next(loader) for loader in loaders], strict=True)
        found += [batch.input_ids for ranks in micro_batches for batch in ranks]
    return torch.cat(found)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world_size=st.sampled_from([1, 2, 3, 4, 6]),
    batch_size=st.sampled_from([1, 2]),
    resume=st.integers(0, 12),
    samples=st.sampled_from(["null", "7", "100"]),
)
def test_any_ranks_accumulation_and_resume_point_give_the_same_stream(dummy, world_size, batch_size, resume, samples):
    manifest, config = dummy
    config = override_config(config, ["training.global_batch_size=24", f"data.train_samples={samples}"])
    one = override_config(config, ["training.batch_size=24"])
    other = override_config(config, [f"training.batch_size={batch_size}"])
    straight = rows(manifest, one, resume + 3)[resume * 24 :]
    assert torch.equal(rows(manifest, other, 3, first_step=resume, world_size=world_size), straight)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_stream(dummy, workers):
    manifest, config = dummy
    with_workers = override_config(config, [f"data.num_workers={workers}"])
    assert torch.equal(
        rows(manifest, with_workers, 6, first_step=5, world_size=2),
        rows(manifest, config, 6, first_step=5, world_size=2),
    )


def test_what_a_worker_is_given_can_be_pickled(dummy):
    manifest, config = dummy
    steps = TrainLoader(manifest, config)._steps
    assert torch.equal(pickle.loads(pickle.dumps(steps))[3][0].labels, steps[3][0].labels)


def test_workers_give_whole_batches(dummy):
    manifest, config = dummy
    config = override_config(config, ["training.batch_size=50"])
    step = next(iter(TrainLoader(manifest, override_config(config, ["data.num_workers=1"]))))
    expected = next(iter(TrainLoader(manifest, config)))
    for batch, other in zip(step, expected, strict=True):
        assert torch.equal(batch.labels, other.labels)
        assert torch.equal(batch.document_ids, other.document_ids)
        assert batch.num_tokens == other.num_tokens


def test_an_epoch_of_training_predicts_every_token_of_the_split_once(dummy):
    manifest, config = dummy
    config = override_config(config, ["training.batch_size=1"])
    loader = TrainLoader(manifest, config)
    assert loader.steps_per_epoch == manifest.splits["train"].sequences
    steps = list(islice(loader, loader.steps_per_epoch))
    assert sum(batch.num_tokens for step in steps for batch in step) == manifest.splits["train"].tokens


def test_labels_follow_their_inputs_and_documents_do_not_mix(dummy):
    manifest, config = dummy
    batch = next(iter(TrainLoader(manifest, override_config(config, ["training.batch_size=50"]))))[0]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.document_ids.dtype == torch.int32
    assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
    opens = batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
    assert torch.equal(opens, batch.input_ids[:, 1:] == manifest.eos_id)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_validation_predicts_every_token_once_over_all_ranks(dummy, world_size, batch_size):
    manifest, config = dummy
    config = override_config(config, [f"evaluation.batch_size={batch_size}"])
    passes = [list(ValidationLoader(manifest, config, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in passes}) == 1
    assert sum(batch.num_tokens for batches in passes for batch in batches) == manifest.splits["validation"].tokens
    labels = torch.cat([row for ranks in zip(*passes, strict=True) for batch in ranks for row in batch.labels])
    whole = torch.cat([batch.labels.flatten() for batch in ValidationLoader(manifest, config)])
    assert torch.equal(labels[labels >= 0], whole[whole >= 0])


def test_validation_can_be_a_part_taken_evenly(dummy):
    manifest, config = dummy
    config = override_config(config, ["evaluation.batch_size=1"])
    part = [batch.labels for batch in ValidationLoader(manifest, config, max_sequences=10)]
    whole = [batch.labels for batch in ValidationLoader(manifest, config)]
    places = [next(index for index, row in enumerate(whole) if torch.equal(row, chosen)) for chosen in part]
    assert len(set(places)) == 10
    assert places[0] == 0
    assert places[-1] >= 0.85 * len(whole)
    assert len(list(ValidationLoader(manifest, config, max_sequences=10**9))) == len(whole)


def test_batches_of_a_mixture_carry_the_expert_group_of_each_source(tiny_config, tmp_path):
    (tmp_path / "capitals.txt").write_text("ONE TWO THREE " * 500, encoding="utf-8")
    values = {"dataset": "dummy", "weight": 3, "expert_group": "skill"}, {"dataset": f"{tmp_path}/*.txt", "weight": 1}
    config = override_config(
        tiny_config, [f"data.mix_datasets={json.dumps(values)}", "training.batch_size=200", "training.seed=3"]
    )
    manifest = prepare_data(config)
    batch = next(iter(TrainLoader(manifest, config)))[0]
    groups = batch.source_groups
    assert groups.shape == batch.input_ids.shape
    assert set(groups.unique().tolist()) == {-1, 1}
    # 200 draws of 3/4 have a standard deviation of 0.031.
    assert abs((groups[:, 0] == 1).float().mean() - 0.75) < 5 * 0.031
    tokenizer = Tokenizer.load(manifest.tokenizer_folder)
    for row, group in zip(batch.labels, groups[:, 0].tolist(), strict=True):
        assert tokenizer.decode(row[row >= 0].tolist()).isupper() == (group == -1)
    tokens = sum(batch.num_tokens for batch in ValidationLoader(manifest, config))
    assert tokens == sum(source.splits["validation"].tokens for source in manifest.sources)


def test_no_documents_or_groups_are_named_where_there_is_nothing_to_tell_apart(tiny_config, tmp_path):
    (tmp_path / "long.txt").write_text("one two three " * 3000, encoding="utf-8")
    config = override_config(tiny_config, [f"data.dataset={tmp_path / 'long.txt'}", "training.batch_size=1"])
    batch = next(iter(TrainLoader(prepare_data(config), config)))[0]
    assert batch.document_ids is None
    assert batch.source_groups is None


def test_a_batch_moves_to_a_device_whole(dummy):
    manifest, config = dummy
    batch = next(iter(TrainLoader(manifest, override_config(config, ["training.batch_size=50"]))))[0]
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.labels.device.type == moved.document_ids.device.type == "meta"
    assert moved.source_groups is None
    assert moved.num_tokens == batch.num_tokens


def test_accumulation_follows_from_the_global_batch(tiny_config):
    config = override_config(tiny_config, ["training.global_batch_size=24"])
    assert accumulation_steps(config, world_size=2) == 3
    assert global_batch_size(config, world_size=2) == 24
    config = override_config(tiny_config, ["training.gradient_accumulation_steps=3"])
    assert global_batch_size(config, world_size=2) == 4 * 2 * 3


def test_a_global_batch_that_does_not_divide_is_refused_with_the_arithmetic(tiny_config):
    config = override_config(tiny_config, ["training.global_batch_size=20"])
    with pytest.raises(ConfigError, match=r"20 is not a multiple of .*4 × 2 ranks = 8.*set it to 16 or 24"):
        accumulation_steps(config, world_size=2)


def test_data_of_another_sequence_length_is_refused(dummy):
    manifest, config = dummy
    with pytest.raises(ConfigError, match=r"max_seq_length=64, but the data .* was prepared for 32"):
        TrainLoader(manifest, override_config(config, ["model.max_seq_length=64"]))
