import gc

import pytest
from test_rollback import BadBatches

from ultrathink_model.training.guard import TrainingDivergedError


@pytest.fixture
def collections(monkeypatch) -> list[bool]:
    """Whether Python's own collector was on at each collection that was asked for."""
    seen = []
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda *arguments: (seen.append(gc.isenabled()), collect(*arguments))[1])
    return seen


def test_garbage_is_collected_at_the_runs_steps_only_and_given_back_to_python(train_tiny, collections):
    train_tiny("training.gc_steps=2")
    assert collections.count(False) == 3
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_run_that_fails_gives_the_collector_back_too(train_tiny, collections, monkeypatch):
    monkeypatch.setattr("ultrathink_model.training.assembly.Trainer", BadBatches)
    with pytest.raises(TrainingDivergedError):
        train_tiny("training.gc_steps=2", "training.max_steps=12", "training.max_bad_steps=0")
    assert gc.isenabled()


def test_without_the_key_python_collects_as_it_likes(train_tiny, collections):
    train_tiny("training.max_steps=2")
    assert False not in collections
