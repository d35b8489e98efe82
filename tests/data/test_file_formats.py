import csv
import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ultrathink_model.config import make_config
from ultrathink_model.data import json_lines
from ultrathink_model.data.intake import Intake
from ultrathink_model.data.sources import open_source
from ultrathink_model.errors import DataError

GOOD = "".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(40))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "corpus"
    path.mkdir()
    return path


def read(name, tmp_path, **data):
    """The texts of a source, and the rows that were refused."""
    values = {"dataset": str(name), "cache_dir": str(tmp_path / "cache"), "max_quarantine_fraction": 1, **data}
    config = make_config({"data": values})
    quarantine = tmp_path / "quarantine.jsonl"
    quarantine.unlink(missing_ok=True)
    intake = Intake(open_source(config.data.dataset, config.data), config.data, quarantine)
    texts = [document.text for document in intake.documents()]
    bad = [json.loads(line) for line in quarantine.read_text().splitlines()] if quarantine.exists() else []
    return texts, bad


def compress(path, data):
    """Writes a file as its name says."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(data)
    else:
        path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_of_every_format_hold_what_the_plain_ones_do(folder, tmp_path, suffix):
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["parquet 1", "parquet 2"]}), table)
    for name, data, expected in (
        ("a.jsonl", GOOD.encode(), [f"document {number}" for number in range(40)]),
        ("a.csv", b"id,text\n1,one\n2,two\n", ["one", "two"]),
        ("a.parquet", table.getvalue().to_pybytes(), ["parquet 1", "parquet 2"]),
    ):
        assert read(compress(folder / (name + suffix), data), tmp_path) == (expected, [])
    text = ("line of text\n" * 200_000).encode()
    assert "".join(read(compress(folder / ("a.md" + suffix), text), tmp_path)[0]).encode() == text


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.csv.gz", "a.txt.gz", "a.txt.zst"])
def test_a_truncated_compressed_file_is_refused(folder, tmp_path, name):
    path = compress(folder / name, b"text\n" + os.urandom(50_000).hex().encode() + b"\n")
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(DataError, match=rf"{name}.*(runcated|damaged).*copy"):
        read(path, tmp_path)


def test_csv_keeps_quoted_line_ends_commas_and_crlf(folder, tmp_path):
    rows = ["plain", "two\nlines", 'a "quoted", word', "three\r\nlines", "x" * 200_000]
    with (folder / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["id", "body"], *([number, text] for number, text in enumerate(rows))])
    assert read(folder, tmp_path, text_column="body") == (rows, [])


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (b"1,a,b\n", "row has the header's 2 fields"),
        (b"1,caf\xe9\n", "row is UTF-8"),
        (b"1,a\0b\n", "text has no NUL"),
        (b"1,\n", "text is not empty"),
    ],
)
def test_bad_csv_records_are_quarantined_with_their_number(folder, tmp_path, line, rule):
    (folder / "a.csv").write_bytes(b"id,text\n0,good\n" + line + b"2,good\n")
    texts, bad = read(folder, tmp_path)
    assert texts == ["good", "good"]
    assert [(row["file"], row["row"], row["rule"]) for row in bad] == [("a.csv", 2, rule)]


def test_csv_that_cannot_be_read_is_refused(folder, tmp_path):
    (folder / "a.csv").write_text("id,body\n1,x\n")
    with pytest.raises(DataError, match=r"no column 'text' but id, body; set data\.text_column"):
        read(folder, tmp_path)
    (folder / "a.csv").write_text('id,text\n1,"never closed\n')
    with pytest.raises(DataError, match=r"cannot be read as CSV .*quoted"):
        read(folder, tmp_path)


def test_a_parquet_cut_in_half_is_refused(folder, tmp_path):
    path = folder / "a.parquet"
    pq.write_table(pa.table({"text": ["one"] * 1000}), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(path, tmp_path)


def test_a_line_of_50_megabytes_is_one_document_and_an_endless_one_is_refused_unread(folder, tmp_path, monkeypatch):
    path = folder / "a.jsonl"
    path.write_text('{"text": "first"}\n{"text": "' + "word " * 10_000_000 + '"}\n{"text": "last"}\n')
    texts, bad = read(path, tmp_path)
    assert ([len(text) for text in texts], bad) == ([5, 50_000_000, 4], [])
    monkeypatch.setattr(json_lines, "MAX_ROW_BYTES", 2**20)
    texts, bad = read(path, tmp_path)
    assert texts == ["first", "last"]
    assert [(row["row"], row["rule"]) for row in bad] == [(2, "row has at most 1 MiB")]


def test_a_byte_order_mark_and_crlf_make_no_bad_row(folder, tmp_path):
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    texts, bad = read(folder, tmp_path)
    assert (len(texts), bad) == (40, [])


def test_a_text_file_of_another_encoding_is_quarantined_and_the_others_are_read(folder, tmp_path):
    (folder / "a.txt").write_text("good", encoding="utf-8")
    (folder / "b.txt").write_bytes("schön".encode("latin-1"))
    (folder / "c.txt").write_bytes("wide".encode("utf-16"))
    (folder / "d.txt").write_text("better", encoding="utf-8")
    texts, bad = read(folder, tmp_path)
    assert texts == ["good", "better"]
    assert [(row["file"], row["rule"]) for row in bad] == [("b.txt", "file is UTF-8"), ("c.txt", "file is UTF-8")]
    assert "iconv -f LATIN1" in bad[0]["excerpt"]
    assert "iconv -f UTF-16" in bad[1]["excerpt"]


def test_links_that_leave_the_folder_are_quarantined_and_links_within_are_read(folder, tmp_path):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key.txt").write_text("secret")
    (folder / "a.txt").write_text("own")
    (folder / "b.txt").write_text("own too")
    (folder / "inner.txt").symlink_to("a.txt")
    (folder / "outer.txt").symlink_to(tmp_path / "secrets" / "key.txt")
    (folder / "outer_folder").symlink_to(tmp_path / "secrets")
    texts, bad = read(folder, tmp_path)
    assert texts == ["own", "own too", "own"]
    assert [(row["file"], row["rule"]) for row in bad] == [
        ("outer.txt", "file lies within the folder"),
        ("outer_folder", "file lies within the folder"),
    ]
    with pytest.raises(DataError, match="file lies within the folder: 2 rows"):
        read(folder, tmp_path, max_quarantine_fraction=0.1)


def test_a_mirror_may_link_to_elsewhere_in_itself(folder, tmp_path):
    (folder / "blobs").mkdir()
    (folder / "blobs" / "1").write_text(GOOD)
    (folder / "openwebtext").mkdir()
    (folder / "openwebtext" / "train.jsonl").symlink_to("../blobs/1")
    texts, bad = read("openwebtext", tmp_path, mirror_dir=str(folder))
    assert (len(texts), bad) == (40, [])
