import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrathink_model.data import shards
from ultrathink_model.data.pack import IGNORED, BestFitRows, StreamRows, pack_best_fit, read_row
from ultrathink_model.data.shards import PIECE_TOKENS, ShardWriter, TokenStream, WriterState, read_ends

EOS, PAD = 1, 0
DOCUMENTS = st.lists(st.lists(st.integers(2, 60_000), max_size=30), min_size=1, max_size=12)


def write_stream(root, documents, shard_tokens, piece_tokens=PIECE_TOKENS, threads=1):
    with (
        ThreadPoolExecutor(threads) as pool,
        ShardWriter(root, "train/00", "uint16", pool, shard_tokens=shard_tokens, piece_tokens=piece_tokens) as writer,
    ):
        for tokens in documents:
            writer.add([*tokens, EOS])
    return TokenStream(root, writer.shards, "uint16")


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("0*.*")}


@given(documents=DOCUMENTS, shard_tokens=st.integers(1, 60), length=st.integers(1, 20))
def test_packing_loses_and_repeats_no_token(documents, shard_tokens, length):
    expected = [token for tokens in documents for token in [*tokens, EOS]]
    owner = [number for number, tokens in enumerate(documents) for _ in [*tokens, EOS]]
    with tempfile.TemporaryDirectory() as folder:
        stream = write_stream(Path(folder), documents, shard_tokens)
        cut = StreamRows(len(stream), length)
        rows = [read_row(stream, cut[index], length, EOS, PAD) for index in range(len(cut))]
    labels = np.concatenate([row.labels for row in rows])
    inputs = np.concatenate([row.input_ids for row in rows])
    kept = labels != IGNORED
    assert labels[kept].tolist() == expected
    # Only the end of the last row is filled up.
    assert kept.tolist() == [True] * len(expected) + [False] * (len(kept) - len(expected))
    assert inputs[kept].tolist() == [EOS, *expected[:-1]]
    assert set(inputs[~kept].tolist()) <= {PAD}
    for index, row in enumerate(rows):
        owners = np.asarray(owner[index * length : (index + 1) * length])
        assert row.document_ids.dtype == np.int32
        assert row.document_ids[: len(owners)].tolist() == (owners - owners[0]).tolist()
        assert set(row.document_ids[len(owners) :].tolist()) <= {row.document_ids[len(owners) - 1]}


@given(documents=DOCUMENTS, shard_tokens=st.integers(1, 60), data=st.data())
def test_any_slice_of_the_stream_names_the_documents_that_end_in_it(documents, shard_tokens, data):
    expected = [token for tokens in documents for token in [*tokens, EOS]]
    start = data.draw(st.integers(0, len(expected) - 1))
    stop = data.draw(st.integers(start + 1, len(expected)))
    with tempfile.TemporaryDirectory() as folder:
        tokens, ends = write_stream(Path(folder), documents, shard_tokens).read(start, stop)
    assert tokens.tolist() == expected[start:stop]
    assert ends.tolist() == [place + 1 for place, token in enumerate(expected[start:stop]) if token == EOS]


def test_a_document_that_begins_a_row_is_opened_by_the_end_of_the_one_before(tmp_path):
    stream = write_stream(tmp_path, [[10, 11, 12], [20, 21, 22]], 100)
    row = read_row(stream, [(4, 4)], 4, EOS, PAD)
    assert row.input_ids.tolist() == [EOS, 20, 21, 22]
    assert row.labels.tolist() == [20, 21, 22, EOS]
    assert row.document_ids.tolist() == [0, 0, 0, 0]


def test_shards_end_with_a_document_and_hold_no_pickle(tmp_path):
    with ThreadPoolExecutor() as pool, ShardWriter(tmp_path, "train/00", "uint32", pool, shard_tokens=5) as writer:
        for tokens in ([70_000, 1], [2, 3, 1], [4, 5, 6, 7, 8, 9, 1], [1]):
            writer.add(tokens)
    assert [(shard.tokens, shard.documents) for shard in writer.shards] == [(5, 2), (7, 1), (1, 1)]
    assert read_ends(tmp_path, writer.shards[0]).tolist() == [2, 5]
    assert TokenStream(tmp_path, writer.shards, "uint32").read(0, 2)[0].tolist() == [70_000, 1]


@given(documents=DOCUMENTS, length=st.integers(1, 20))
def test_best_fit_loses_and_repeats_no_token_and_cuts_only_documents_longer_than_a_row(documents, length):
    stored = [[*tokens, EOS] for tokens in documents]
    with tempfile.TemporaryDirectory() as folder:
        stream = write_stream(Path(folder), documents, 10_000)
        ends = np.cumsum([len(tokens) for tokens in stored])
        BestFitRows.write(Path(folder), pack_best_fit(ends, length))
        packed = BestFitRows(Path(folder))
        segments = [packed[index] for index in range(len(packed))]
        rows = [read_row(stream, row, length, EOS, PAD) for row in segments]
    places = sorted(place for row in segments for start, size in row for place in range(start, start + size))
    assert places == list(range(int(ends[-1])))
    whole = [token for tokens in stored for token in tokens]
    pieces = set()
    for row, segment in zip(rows, segments, strict=True):
        place = 0
        for number, (start, size) in enumerate(segment):
            part = slice(place, place + size)
            assert row.labels[part].tolist() == whole[start : start + size]
            assert row.input_ids[part].tolist() == [EOS, *whole][start : start + size]
            assert set(row.document_ids[part].tolist()) == {number}
            pieces.add((start, size))
            place += size
        assert (row.labels[place:] == IGNORED).all()
    for tokens, end in zip(stored, ends.tolist(), strict=True):
        if len(tokens) <= length:
            assert (end - len(tokens), len(tokens)) in pieces


@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_best_fit_leaves_at_most_one_row_half_empty(lengths):
    rows, _, sizes = pack_best_fit(np.cumsum(lengths), 64)
    filled = [int(part.sum()) for part in np.split(sizes, rows[:-1])]
    assert sum(size <= 32 for size in filled) <= 1
    assert max(filled) <= 64


def test_a_writer_that_was_cut_goes_on_and_the_shards_are_the_same(tmp_path):
    documents = [[number] * (number % 7 + 1) for number in range(2, 60)]
    write_stream(tmp_path / "whole", documents, 50)
    sizes = {"shard_tokens": 50, "piece_tokens": 20}
    with ThreadPoolExecutor(4) as pool:
        first = ShardWriter(tmp_path / "cut", "train/00", "uint16", pool, **sizes)
        for tokens in documents[:20]:
            first.add([*tokens, EOS])
        state = WriterState.model_validate_json(first.state().model_dump_json())
        for tokens in documents[20:40]:  # written, but lost with the process
            first.add([*tokens, EOS])
    with (
        ThreadPoolExecutor(4) as pool,
        ShardWriter(tmp_path / "cut", "train/00", "uint16", pool, **sizes, state=state) as second,
    ):
        for tokens in documents[20:]:
            second.add([*tokens, EOS])
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@given(documents=DOCUMENTS, shard_tokens=st.integers(1, 60), piece_tokens=st.integers(1, 30))
def test_the_bytes_are_the_same_however_many_pieces_and_threads_write_them(documents, shard_tokens, piece_tokens):
    with tempfile.TemporaryDirectory() as folder:
        one, many = Path(folder, "one"), Path(folder, "many")
        write_stream(one, documents, shard_tokens)
        write_stream(many, documents, shard_tokens, piece_tokens, threads=4)
        assert contents(one) == contents(many)


def test_pieces_and_shards_are_written_at_the_same_time(tmp_path, monkeypatch):
    # Each write waits for three others: one by one they would never end.
    together, write_at, writing = threading.Barrier(4, timeout=30), shards._write_at, set()

    def write_together(path, place, values):
        writing.add(path.name)
        together.wait()
        write_at(path, place, values)

    monkeypatch.setattr(shards, "_write_at", write_together)
    documents = [[number] * 9 for number in range(2, 10)]
    stream = write_stream(tmp_path, documents, shard_tokens=20, piece_tokens=10, threads=4)
    assert stream.read(0, len(stream))[0].tolist() == [token for tokens in documents for token in [*tokens, EOS]]
    assert {"00000.bin", "00001.bin", "00003.ends"} <= writing


def test_a_piece_that_cannot_be_written_is_the_writers_error_and_ends_the_others(tmp_path, monkeypatch):
    def fail(path, place, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_write_at", fail)
    with pytest.raises(OSError, match="No space left"):
        write_stream(tmp_path, [[2] * 9] * 40, shard_tokens=1000, piece_tokens=10, threads=4)
