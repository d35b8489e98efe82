import json
from pathlib import Path

import pytest
import torch

from ultrathink_model.config import override_config
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.errors import DataError
from ultrathink_model.evaluation.blimp import blimp_metrics, read_blimp
from ultrathink_model.evaluation.measures import measure_blimp
from ultrathink_model.models.transformer import build_model


@pytest.fixture
def folder(tmp_path):
    """Two paradigms, of five pairs and of three."""
    words = ("roads", "debts", "courts", "peace", "schools")
    folder = tmp_path / "blimp"
    folder.mkdir()
    for name, count in (("agreement", 5), ("order", 3)):
        pairs = [
            {"sentence_good": f"The people ask for {word}.", "sentence_bad": f"The people {word} for ask."}
            for word in words[:count]
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return folder


def test_accuracy_is_the_share_of_pairs_whose_good_sentence_is_likelier(text_config, manifest, folder):
    model, tokenizer = build_model(text_config).eval(), Tokenizer.load(manifest.tokenizer_folder)
    metrics = blimp_metrics(model, tokenizer, folder, None, batch_size=2)
    hits = []
    for pair in (pair for pairs in read_blimp(folder, None).values() for pair in pairs):
        totals = []
        for sentence in pair:
            ids = [tokenizer.bos_id, *tokenizer.encode(sentence)]
            logprobs = model(torch.tensor([ids[:-1]])).logits.detach().log_softmax(-1)[0]
            totals.append(float(logprobs.gather(1, torch.tensor(ids[1:])[:, None]).sum()))
        hits.append(totals[0] > totals[1])
    assert metrics["eval/blimp/accuracy"] == pytest.approx(sum(hits) / 8)
    assert metrics["eval/blimp_order/accuracy"] == pytest.approx(sum(hits[5:]) / 3)
    spread = (8 / 7 * metrics["eval/blimp/accuracy"] * (1 - metrics["eval/blimp/accuracy"])) ** 0.5
    assert metrics["eval/blimp/accuracy_stderr"] == pytest.approx(spread / 8**0.5)


def test_pairs_can_be_cut(folder):
    assert {name: len(pairs) for name, pairs in read_blimp(folder, 4).items()} == {"agreement": 4, "order": 3}


def test_the_config_says_how_many_pairs_are_read(text_config, manifest, folder):
    # A pair beyond those that are asked for is never looked at, even one that is none.
    with (folder / "order.jsonl").open("a", encoding="utf-8") as file:
        file.write("no pair\n")
    model, tokenizer = build_model(text_config).eval(), Tokenizer.load(manifest.tokenizer_folder)
    asked = override_config(text_config, [f"evaluation.blimp={folder}", "evaluation.blimp_pairs=3"])
    assert measure_blimp(model, tokenizer, asked) == blimp_metrics(model, tokenizer, folder, 3, batch_size=2)
    with pytest.raises(DataError):
        measure_blimp(model, tokenizer, override_config(asked, ["evaluation.blimp_pairs=null"]))


def test_the_files_may_lie_in_a_folder_data(folder, tmp_path):
    (tmp_path / "repository").mkdir()
    folder.rename(tmp_path / "repository" / "data")
    assert set(read_blimp(tmp_path / "repository", None)) == {"agreement", "order"}


@pytest.mark.parametrize("line", ['{"sentence_good": "a"}', "no JSON", '["a", "b"]'])
def test_a_line_that_is_no_pair_is_named(folder, line):
    with (folder / "order.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"line 4 of .*order\.jsonl is no minimal pair"):
        read_blimp(folder, None)


def test_a_folder_without_files_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no \.jsonl files"):
        read_blimp(Path(tmp_path), None)
