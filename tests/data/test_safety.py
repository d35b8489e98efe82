import json

import pytest
import torch

from ultrathink_model.config import override_config
from ultrathink_model.config.model import HARM_CATEGORIES
from ultrathink_model.data import Tokenizer, TrainLoader, prepare_data
from ultrathink_model.data.safety import SafetyRows, load_safety_texts, with_safety_rows
from ultrathink_model.errors import DataError


@pytest.fixture
def config(tiny_config):
    return override_config(tiny_config, ["advanced.enable_constitutional=true"])


def steps(config, count, first_step=0, rank=0, world_size=1):
    manifest = prepare_data(config)
    loader = TrainLoader(manifest, config, rank=rank, world_size=world_size, first_step=first_step)
    found = with_safety_rows(iter(loader), manifest, config, rank, world_size, first_step)
    return [next(found) for _ in range(count)]


def test_built_in_texts_cover_every_category_on_both_sides(config):
    texts = load_safety_texts(config)
    for part in (texts.train, texts.held_out):
        assert {name for text in part for name in text.categories} == set(HARM_CATEGORIES)
        assert any(not text.categories for text in part)
    assert not {text.topic for text in texts.train} & {text.topic for text in texts.held_out}
    share = len(texts.held_out) / (len(texts.held_out) + len(texts.train))
    assert share == pytest.approx(0.25, abs=0.02)


def test_rows_hold_each_text_with_its_label_and_its_own_document(config):
    manifest = prepare_data(config)
    tokenizer = Tokenizer.load(manifest.tokenizer_folder)
    texts = load_safety_texts(config).train[:6]
    rows = SafetyRows(texts, tokenizer, 32, seed=1)
    batch = rows.extend(steps(config, 1)[0][0], list(range(len(rows))))
    ids, documents = batch.input_ids[4:], batch.document_ids[4:]
    assert batch.harm_labels.shape == ids.shape
    assert (batch.labels[4:] == -100).all()
    assert torch.equal(batch.labels[:4], steps(config, 1)[0][0].labels)
    text_of_bits = {}
    for row in range(len(ids)):
        for document in documents[row].unique():
            inside = documents[row] == document
            assert len(batch.harm_labels[row][inside].unique()) == 1
            text_of_bits.setdefault(int(batch.harm_labels[row][inside][0]), []).append(
                tokenizer.decode(ids[row][inside].tolist())
            )
    for text in texts:
        # What is cut at a row's end goes on in the next row.
        assert any(text.text.startswith(part[:10]) for part in text_of_bits[text.bits])


def test_labelled_share_is_what_the_key_says(config):
    config = override_config(config, ["constitutional.harm_token_fraction=0.1"])
    found = steps(config, 40)
    labelled = sum(batch.harm_labels.numel() for step in found for batch in step if batch.harm_labels is not None)
    corpus = sum(batch.num_tokens for step in found for batch in step)
    assert labelled / corpus == pytest.approx(0.1, rel=0.05)


def test_resumed_and_divided_runs_see_the_same_rows(config):
    config = override_config(config, ["constitutional.harm_token_fraction=0.5"])
    whole, later = steps(config, 8), steps(config, 4, first_step=4)
    for step, again in zip(whole[4:], later, strict=True):
        assert torch.equal(step[0].input_ids, again[0].input_ids)
    ranks = [steps(config, 4, rank=rank, world_size=2) for rank in range(2)]
    for left, right in zip(*ranks, strict=True):
        assert left[0].harm_labels.shape == right[0].harm_labels.shape
        assert not torch.equal(left[0].input_ids[4:], right[0].input_ids[4:])


def test_without_the_feature_nothing_is_added(tiny_config):
    assert all(batch.harm_labels is None for step in steps(tiny_config, 30) for batch in step)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_own_texts_are_read_and_bad_rows_named(config, tmp_path):
    good = [{"text": f"text {n}", "labels": ["violence", "hate"] if n % 2 else []} for n in range(40)]
    bad = [{"text": "x", "labels": ["theft"]}, {"text": " ", "labels": []}, {"text": "x", "labels": "hate"}]
    path = write(tmp_path / "safety.jsonl", good + bad)
    overrides = [f"constitutional.safety_data={path}", "constitutional.holdout_fraction=0.5"]
    with pytest.raises(DataError, match=r"3 of 43 rows.*row 41: labels holds only violence"):
        load_safety_texts(override_config(config, overrides))
    texts = load_safety_texts(override_config(config, [*overrides, "data.max_quarantine_fraction=0.1"]))
    assert [row.row for row in texts.quarantined] == [41, 42, 43]
    assert len(texts.train) == len(texts.held_out) == 20
    assert {text.bits for text in texts.train} == {0, 3}


def test_too_few_texts_are_refused(config, tmp_path):
    path = write(tmp_path / "safety.jsonl", [{"text": "x", "labels": []}])
    with pytest.raises(DataError, match="no text to measure on"):
        load_safety_texts(override_config(config, [f"constitutional.safety_data={path}"]))
