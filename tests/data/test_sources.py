import json
import os
import time
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ultrathink_model.config import make_config
from ultrathink_model.data import file_formats
from ultrathink_model.data.articles import join_articles
from ultrathink_model.data.document import BadRow, Row
from ultrathink_model.data.file_hashes import FileHashes
from ultrathink_model.data.intake import Intake, hold_out
from ultrathink_model.data.known import KNOWN_DATASETS
from ultrathink_model.data.sources import open_source
from ultrathink_model.errors import DataError


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "corpus"
    path.mkdir()
    return path


def read(name, tmp_path, **data):
    """All documents of a source with their splits, and the intake that read them."""
    config = make_config({"data": {"dataset": str(name), "cache_dir": str(tmp_path / "cache"), **data}})
    intake = Intake(open_source(config.data.dataset, config.data), config.data, tmp_path / "quarantine.jsonl")
    return [(document.split, document.text) for document in intake.documents()], intake


def texts(name, tmp_path, **data):
    return [text for _, text in read(name, tmp_path, **data)[0]]


def test_sotu_is_the_whole_corpus_with_every_tenth_speech_held_out(tmp_path):
    documents, intake = read("sotu", tmp_path)
    held = [text for split, text in documents if split == "validation"]
    assert (len(documents), len(held), intake.quarantined) == (233, 23, 0)
    assert sum(len(text.encode()) for _, text in documents) == 10_761_202
    assert held[0] == documents[9][1]
    assert held[1] == documents[19][1]
    names = [row.file for row in open_source("sotu", make_config({}).data).rows("train")]
    assert names == sorted(names)
    assert (names[0], names[-1]) == ("1790_george_washington_n.txt", "2021_joseph_r_biden_d.txt")


def test_dummy_is_the_same_each_time_says_that_it_is_synthetic_and_can_be_learned(tmp_path, caplog):
    caplog.set_level("INFO")
    documents = texts("dummy", tmp_path)
    assert documents == texts("dummy", tmp_path)
    assert "synthetic" in caplog.text
    words = " ".join(documents).replace(".", "").split()
    followers = {}
    for first, second in pairwise(words):
        followers.setdefault(first, []).append(second)
    # Four successors make most of what follows a word; the rest opens a sentence.
    usual = sum(sum(sorted(map(seconds.count, set(seconds)))[-4:]) for seconds in followers.values())
    assert len(followers) == 64
    assert usual / len(words) > 0.85


def test_files_of_a_folder_are_read_in_the_order_of_their_names(folder, tmp_path):
    (folder / "b.txt").write_text("text b", encoding="utf-8")
    (folder / "sub").mkdir()
    (folder / "sub" / "c.md").write_text("# markdown c", encoding="utf-8")
    (folder / "a.jsonl").write_text('{"text": "json a1"}\n\n{"text": "json a2"}', encoding="utf-8")
    pq.write_table(pa.table({"text": ["parquet d1", "parquet d2"]}), folder / "d.parquet")
    (folder / "notes.docx").write_bytes(b"\xff")
    (folder / ".hidden.txt").write_text("hidden", encoding="utf-8")
    expected = ["json a1", "json a2", "text b", "parquet d1", "parquet d2", "# markdown c"]
    assert texts(folder, tmp_path) == expected
    assert "".join(texts(f"{folder}/*.txt", tmp_path, validation_every=2)) == "text b"
    assert texts(f"{folder}/**/*.[mj]*", tmp_path) == ["json a1", "json a2", "# markdown c"]
    assert texts(folder / "d.parquet", tmp_path) == ["parquet d1", "parquet d2"]


def test_bytes_of_text_are_kept_but_for_a_byte_order_mark(folder, tmp_path):
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (folder / "b.txt").write_bytes("drei …".encode())
    assert texts(folder, tmp_path) == ["one\r\ntwo\r\n", "drei …"]


def test_the_text_column_can_be_named(folder, tmp_path):
    (folder / "a.jsonl").write_text('{"body": "one", "text": 1}\n{"body": "two"}\n', encoding="utf-8")
    pq.write_table(pa.table({"body": ["three"], "text": [1]}), folder / "b.parquet")
    assert texts(folder, tmp_path, text_column="body") == ["one", "two", "three"]


@pytest.mark.parametrize("place", [0, 5, 2**20 - 1, 2**20, 3 * 2**20 + 17])
def test_text_that_is_not_utf8_is_refused_with_the_offset(folder, tmp_path, place):
    (folder / "a.txt").write_bytes(b"x" * place + b"\xe9t\xe9" + b"y" * 100)
    with pytest.raises(DataError, match=rf"file is UTF-8: 1 rows.*invalid .* at offset {place}; .*iconv -f LATIN1"):
        texts(folder, tmp_path)


def test_a_character_cut_at_the_end_of_a_file_is_refused_and_one_cut_by_a_block_is_not(folder, tmp_path):
    (folder / "a.txt").write_bytes(b"x" * (2**20 - 1) + "é".encode() + b" end")
    (folder / "b.txt").write_text("b", encoding="utf-8")
    assert texts(folder, tmp_path)[0].endswith("xé end")
    (folder / "b.txt").write_bytes(b"abc" + "€".encode()[:2])
    with pytest.raises(DataError, match=r"file is UTF-8: 1 rows, as in b\.txt row 1: .* at offset 3; "):
        texts(folder, tmp_path)


def test_a_file_longer_than_a_document_is_cut_at_line_ends(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(file_formats, "DOCUMENT_CHARACTERS", 25)
    text = "".join(f"line {number}\n" for number in range(12)) + "x" * 60
    (folder / "a.txt").write_text(text, encoding="utf-8")
    pieces = texts(folder, tmp_path)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 25
    assert all(piece.endswith("\n") for piece in pieces[:4])


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (b"{'text': 1}", "row is JSON"),
        (b"[" * 200_000, "row is JSON"),
        (b'"text"', "row is a JSON object"),
        (b'{"txt": "x"}', "row has the column 'text'"),
        (b'{"text": 7}', "text is a string"),
        (b'{"text": null}', "text is a string"),
        (b'{"text": " "}', "text is not empty"),
        (b'{"text": "a\\u0000b"}', "text has no NUL"),
        (b'{"text": "\\ud800"}', "row is Unicode"),
        (b'{"text": "\xff"}', "row is UTF-8"),
    ],
)
def test_bad_rows_are_quarantined_with_file_row_rule_and_excerpt(folder, tmp_path, line, rule):
    good = b'{"text": "good"}\n'
    (folder / "a.jsonl").write_bytes(good * 60 + line + b"\n" + good * 60)
    documents, intake = read(folder, tmp_path)
    assert [text for _, text in documents] == ["good"] * 120
    assert (intake.rows, intake.quarantined) == (121, 1)
    bad = json.loads((tmp_path / "quarantine.jsonl").read_text(encoding="utf-8"))
    assert (bad["file"], bad["row"], bad["rule"]) == ("a.jsonl", 61, rule)
    assert 0 < len(bad["excerpt"]) < 300


def test_too_many_bad_rows_are_refused_with_the_three_commonest_rules(folder, tmp_path):
    lines = ["{"] * 5 + ["[]"] * 4 + ['{"text": 1}'] * 3 + ['{"text": ""}'] * 2 + ['{"text": "good"}'] * 86
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError) as refused:
        read(folder, tmp_path)
    message = str(refused.value)
    assert "14 of 100 rows (14.0%) break the schema, more than data.max_quarantine_fraction=0.01" in message
    assert message.index("row is JSON: 5 rows, as in a.jsonl row 1: '{'") < message.index(
        "row is a JSON object: 4 rows"
    )
    assert message.index("row is a JSON object: 4 rows") < message.index("text is a string: 3 rows")
    assert "text is not empty" not in message
    assert len(read(folder, tmp_path, max_quarantine_fraction=0.14)[0]) == 86


def test_parquet_that_cannot_be_read_is_refused(folder, tmp_path):
    file = folder / "a.parquet"
    pq.write_table(pa.table({"body": ["one"] * 100}), file)
    with pytest.raises(DataError, match=r"has no column 'text' but body; set data\.text_column"):
        texts(file, tmp_path)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        texts(file, tmp_path)


def test_parquet_rows_that_are_no_text_are_quarantined(folder, tmp_path):
    # Written by a careless tool: bytes that are not UTF-8 in a column of strings.
    _, offsets, raw = pa.array([b"good", b"\xffe"]).buffers()
    values = pa.StringArray.from_buffers(2, offsets, raw)
    pq.write_table(pa.table({"text": values}), folder / "a.parquet")
    pq.write_table(pa.table({"text": pa.array(["good", None])}), folder / "b.parquet")
    documents, _ = read(folder, tmp_path, max_quarantine_fraction=0.5)
    assert [text for _, text in documents] == ["good", "good"]
    rules = [json.loads(line)["rule"] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert rules == ["row is UTF-8", "text is a string"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{folder}/none.txt", "there is no such file or folder"),
        ("{folder}/none/*.txt", "there is no such file or folder"),
        ("{folder}", "there is no such file or folder, or it is empty"),
        ("./nowhere", "there is no such file or folder"),
    ],
)
def test_what_is_not_there_is_refused(folder, tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        texts(name.format(folder=folder), tmp_path)


def test_unknown_formats_are_refused_with_the_known_ones(folder, tmp_path):
    (folder / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match=r"the format \.pdf is not among \.txt, .*\.parquet"):
        texts(folder / "a.pdf", tmp_path)
    with pytest.raises(DataError, match="none of its 1 files is of a known format"):
        texts(folder, tmp_path)


def test_empty_data_is_refused(folder, tmp_path):
    for name, content in (("a.txt", ""), ("b.jsonl", ""), ("c.jsonl", '{"text": ""}\n'), ("d.md", "  \n")):
        (folder / name).write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=r"is empty: none of its . rows is a document"):
            texts(folder / name, tmp_path)
    (folder / "word.txt").write_text("word", encoding="utf-8")
    with pytest.raises(DataError, match="1 training and 0 validation documents, and both are needed"):
        texts(folder / "word.txt", tmp_path)


def test_a_lone_document_is_cut_and_its_last_part_held_out(folder, tmp_path):
    text = "".join(f"line {number}\n" for number in range(100))
    (folder / "a.txt").write_text(text, encoding="utf-8")
    (train, first), (validation, last) = read(folder / "a.txt", tmp_path)[0]
    assert (train, validation) == ("train", "validation")
    assert first + last == text
    assert first.endswith("\n")
    assert 0.1 <= len(last) / len(text) < 0.12


def test_every_nth_document_is_held_out():
    splits = [document.split for document in hold_out(((Row("a", 1, text), ()) for text in "abcdefg"), 3)]
    assert splits == ["train", "train", "validation", "train", "train", "validation", "train"]
    assert [document.split for document in hold_out(((Row("a", 1, text), ()) for text in "ab"), 10)] == [
        "train",
        "validation",
    ]


def test_files_named_for_their_split_are_the_splits_and_test_files_are_left_out(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("train-0.txt", "train-1.txt", "valid.txt", "test.txt"):
        (folder / name).write_text(name, encoding="utf-8")
    documents, _ = read(folder, tmp_path)
    assert documents == [("train", "train-0.txt"), ("train", "train-1.txt"), ("validation", "valid.txt")]
    assert "left out: test.txt" in caplog.text
    (folder / "valid.txt").unlink()
    assert len(texts(folder, tmp_path)) == 3


def test_a_known_name_is_read_from_a_mirror_with_its_articles(tmp_path, folder):
    mirror = folder / "wikitext" / "wikitext-2-raw-v1"
    mirror.mkdir(parents=True)
    lines = ["", " = One = \n", "", " text of one \n", " = = Part = = \n", " more \n", " = Two = \n", " text of two \n"]
    pq.write_table(pa.table({"text": lines}), mirror / "train-00000.parquet")
    (mirror / "validation.txt").write_text("".join(lines), encoding="utf-8")
    articles = [" = One = \n text of one \n = = Part = = \n more \n", " = Two = \n text of two \n"]
    documents, intake = read("wikitext", tmp_path, mirror_dir=str(folder))
    assert documents == [(split, text) for split in ("train", "validation") for text in articles]
    assert intake.quarantined == 0


def test_articles_keep_every_line_and_pass_bad_rows_on():
    heading = KNOWN_DATASETS["wikitext"].article_heading
    bad = BadRow("a", 3, "row is JSON", "{")
    rows = [
        Row("a", 1, "before \n"),
        Row("a", 2, " = A = \n"),
        bad,
        Row("a", 4, "x"),
        Row("a", 5, None),
        Row("b", 1, "b \n = B = \nc"),
    ]
    joined = list(join_articles(rows, heading))
    assert [row for row in joined if isinstance(row, Row) and row.text is not None] == [
        Row("a", 1, "before \n"),
        Row("a", 2, " = A = \nx"),
        Row("b", 1, "b \n"),
        Row("b", 2, " = B = \nc"),
    ]
    assert bad in joined
    assert Row("a", 5, None) in joined


def test_a_file_is_hashed_again_only_when_it_may_have_changed(tmp_path, folder):
    file = folder / "a.txt"
    file.write_text("one", encoding="utf-8")
    hashes = FileHashes(tmp_path / "cache")
    first = hashes.hash(file)
    hashes.save()
    assert not (tmp_path / "cache").exists()  # too young to be trusted
    time.sleep(2.1)
    assert FileHashes(tmp_path / "cache").hash(file) == first
    hashes = FileHashes(tmp_path / "cache")
    hashes.hash(file)
    hashes.save()
    index = json.loads((tmp_path / "cache" / "file_hashes.json").read_text())
    index[str(file.resolve())][-1] = "remembered"
    (tmp_path / "cache" / "file_hashes.json").write_text(json.dumps(index))
    assert FileHashes(tmp_path / "cache").hash(file) == "remembered"
    stat = file.stat()
    file.write_text("two", encoding="utf-8")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert FileHashes(tmp_path / "cache").hash(file) not in (first, "remembered")
    (tmp_path / "cache" / "file_hashes.json").write_text("{")
    assert FileHashes(tmp_path / "cache").hash(file) not in (first, "remembered")
