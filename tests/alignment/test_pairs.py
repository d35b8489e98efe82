import json
import logging

import pytest
from alignment_cases import ALONE

from ultrathink_model.alignment.pairs import (
    PairSplit,
    TokenPair,
    corpus_windows,
    load_pairs,
    make_pairs,
    save_pairs,
    self_play_pairs,
)
from ultrathink_model.config import override_config
from ultrathink_model.data import Tokenizer, TrainLoader
from ultrathink_model.errors import DataError
from ultrathink_model.models.hf import load_model


@pytest.fixture(scope="module")
def model(dense_folder):
    return load_model(dense_folder).eval()


@pytest.fixture
def config(config):
    """An epoch of few rows, so that reading all of it is quick."""
    return override_config(config, ["data.train_samples=40"])


@pytest.fixture(scope="module")
def tokenizer(manifest) -> Tokenizer:
    return Tokenizer.load(manifest.tokenizer_folder)


def test_windows_are_pieces_of_the_training_split_that_do_not_overlap(config, manifest):
    windows = list(corpus_windows(config, manifest))
    length = config.rlhf.prompt_tokens + config.rlhf.response_tokens
    assert {len(window) for window in windows} == {length}
    assert len({tuple(window) for window in windows}) == len(windows)
    loader = TrainLoader(manifest, config)
    rows = [
        row
        for step, _ in zip(loader, range(loader.steps_per_epoch), strict=False)
        for row in step[0].input_ids.tolist()
    ]
    pieces = {tuple(row[start : start + length]) for row in rows for start in range(0, 32 - length + 1, length)}
    assert {tuple(window) for window in windows} <= pieces


def test_self_play_prefers_the_corpus_to_the_models_own_continuation(config, manifest, model, tokenizer):
    pairs = self_play_pairs(config, manifest, model, ALONE)
    rlhf = config.rlhf
    windows = [
        tuple(window) for _, window in zip(range(rlhf.num_pairs), corpus_windows(config, manifest), strict=False)
    ]
    assert 0 < len(pairs) <= rlhf.num_pairs
    for pair in pairs:
        assert (*pair.prompt, *pair.chosen) in windows
        assert len(pair.prompt) == rlhf.prompt_tokens
        assert len(pair.chosen) == rlhf.response_tokens
        assert pair.rejected != pair.chosen
        assert len(pair.rejected) == rlhf.response_tokens or pair.rejected[-1] == manifest.eos_id
    assert self_play_pairs(config, manifest, model, ALONE) == pairs


def test_self_play_is_held_out_by_prompt(config, manifest, model, tokenizer):
    split = make_pairs(config, manifest, tokenizer, model, ALONE)
    assert len(split.held_out) == round(0.25 * (len(split.train) + len(split.held_out)))
    assert not {tuple(pair.prompt) for pair in split.train} & {tuple(pair.prompt) for pair in split.held_out}


def test_too_small_a_corpus_is_refused_with_the_arithmetic(config, manifest, model):
    windows = len(list(corpus_windows(config, manifest)))
    greedy = override_config(config, [f"rlhf.num_pairs={windows + 1}"])
    with pytest.raises(DataError, match=rf"holds {windows} separate windows .* rlhf.num_pairs={windows + 1}"):
        self_play_pairs(greedy, manifest, model, ALONE)


def test_saved_pairs_are_read_back_as_the_same_tokens(tmp_path, tokenizer):
    # Sampled tokens are often not how the tokenizer would write the same text.
    separator = tokenizer.encode("\u2028")  # a line's end to str.splitlines, and none to JSON lines
    split = PairSplit([TokenPair([11, 2, 3], [4], [5, 5, 5])], [TokenPair([9], [8, 250], separator)])
    save_pairs(split, tokenizer, tmp_path / "pairs.jsonl")
    assert load_pairs(tmp_path / "pairs.jsonl") == split
    line = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])
    assert line["prompt"] == tokenizer.decode([11, 2, 3])
    assert line["split"] == "train"


def recorded(config, tmp_path, rows):
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return override_config(config, [f"rlhf.preference_data={path}"])


def test_recorded_pairs_are_cut_to_the_configs_lengths(config, manifest, model, tokenizer, tmp_path):
    rows = [{"prompt": f"word number {n} " * 9, "chosen": "yes", "rejected": "no, not at all " * 9} for n in range(8)]
    split = make_pairs(recorded(config, tmp_path, rows), manifest, tokenizer, model, ALONE)
    assert len(split.train), len(split.held_out) == (6, 2)
    for pair in (*split.train, *split.held_out):
        assert len(pair.prompt) == 6
        assert pair.chosen == [*tokenizer.encode("yes"), tokenizer.eos_id]
        assert pair.rejected == tokenizer.encode("no, not at all " * 9)[:5]


def test_short_recorded_prompts_open_a_document(config, manifest, model, tokenizer, tmp_path):
    rows = [{"prompt": text, "chosen": "a", "rejected": "b"} for text in ("x", "y")]
    split = make_pairs(recorded(config, tmp_path, rows), manifest, tokenizer, model, ALONE)
    assert {pair.prompt[0] for pair in (*split.train, *split.held_out)} == {tokenizer.bos_id}


def test_sides_that_are_equal_after_the_cut_are_counted_and_left_out(
    config, manifest, model, tokenizer, tmp_path, caplog
):
    same = {"chosen": "word " * 20 + "x", "rejected": "word " * 20 + "y"}
    rows = [{"prompt": f"p{n}", **(same if n == 0 else {"chosen": "a", "rejected": "b"})} for n in range(6)]
    with caplog.at_level(logging.WARNING):
        split = make_pairs(recorded(config, tmp_path, rows), manifest, tokenizer, model, ALONE)
    assert len(split.train) + len(split.held_out) == 5
    assert "have the same first rlhf.response_tokens=5 tokens" in caplog.text


def test_pairs_that_are_all_equal_after_the_cut_are_refused(config, manifest, model, tokenizer, tmp_path):
    same = {"chosen": "word " * 20 + "x", "rejected": "word " * 20 + "y"}
    rows = [{"prompt": f"p{n}", **same} for n in range(4)]
    with pytest.raises(DataError, match=r"0 preference pairs are left .* rlhf.response_tokens"):
        make_pairs(recorded(config, tmp_path, rows), manifest, tokenizer, model, ALONE)


def test_recorded_pairs_with_equal_sides_are_refused(config, manifest, model, tokenizer, tmp_path):
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "a"} for n in range(4)]
    with pytest.raises(DataError, match="chosen and rejected differ"):
        make_pairs(recorded(config, tmp_path, rows), manifest, tokenizer, model, ALONE)
