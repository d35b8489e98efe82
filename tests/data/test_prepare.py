import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ultrathink_model.config import override_config, save_config
from ultrathink_model.config.data import DataSource
from ultrathink_model.data import Tokenizer, build, load_manifest, prepare_data, schema, tokenize
from ultrathink_model.data.build import _begin
from ultrathink_model.data.hub import HubSource
from ultrathink_model.data.known import KnownDataset
from ultrathink_model.data.local import LocalSource
from ultrathink_model.data.shards import TokenStream
from ultrathink_model.data.sources import Ingredient
from ultrathink_model.errors import ConfigError, DataError, SourceLostError, TokenizerError

PREPARE = (
    "import sys; from ultrathink_model.config import load_config; from ultrathink_model.data import prepare_data; "
)
PREPARE += "print(prepare_data(load_config(sys.argv[1])).path)"


@pytest.fixture
def corpus(tmp_path):
    """Twenty lines of JSON whose texts tell their numbers."""
    file = tmp_path / "corpus.jsonl"
    file.write_text(
        "".join(json.dumps({"text": f"document {n} " * (n + 1)}) + "\n" for n in range(20)), encoding="utf-8"
    )
    return file


@pytest.fixture
def config(tiny_config, corpus):
    return override_config(tiny_config, [f"data.dataset={corpus}"])


def left_in(config):
    """What the cache holds beside locks and the index of file hashes."""
    paths = Path(config.data.cache_dir).iterdir()
    return sorted(path.name for path in paths if path.suffix != ".lock" and path.name != "file_hashes.json")


def test_the_shards_hold_the_documents_of_their_split(config, corpus):
    manifest = prepare_data(config)
    written = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    tokenizer = Tokenizer.load(manifest.tokenizer_folder)
    assert tokenizer.hash == manifest.tokenizer_hash
    for split, expected in (
        ("train", [text for number, text in enumerate(written, start=1) if number % 10]),
        ("validation", written[9::10]),
    ):
        stream = TokenStream(manifest.path, manifest.sources[0].shards[split], manifest.token_dtype)
        tokens, ends = stream.read(0, len(stream))
        starts = [0, *ends.tolist()]
        documents = [tokens[first:last].tolist() for first, last in zip(starts, ends.tolist(), strict=False)]
        assert all(document[-1] == manifest.eos_id for document in documents)
        assert [tokenizer.decode(document[:-1]) for document in documents] == expected
        size = manifest.splits[split]
        assert size.documents == len(expected)
        assert size.bytes == sum(len(text.encode()) for text in expected)
        assert size.tokens == len(tokens)
        assert size.sequences == -(-len(tokens) // 32)


def test_the_tokenizer_learns_from_the_training_split_only(config, corpus, tmp_path):
    first = prepare_data(config)
    lines = corpus.read_text().splitlines()
    lines[9] = json.dumps({"text": "wholly other words " * 50})
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(lines))
    second = prepare_data(override_config(config, [f"data.dataset={other}"]))
    assert second.fingerprint != first.fingerprint
    assert second.tokenizer_hash == first.tokenizer_hash


def test_a_second_call_finds_what_the_first_prepared(config, caplog):
    caplog.set_level(logging.INFO)
    first = prepare_data(config)
    assert "training a byte-level BPE" in caplog.text
    caplog.clear()
    stamps = {path: path.stat().st_mtime_ns for path in first.path.rglob("*")}
    second = prepare_data(config)
    assert second == first == load_manifest(first.path)
    assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} == stamps
    assert "training a byte-level BPE" not in caplog.text


def test_the_same_content_elsewhere_is_the_same_data(config, corpus, tmp_path):
    first = prepare_data(config)
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / corpus.name
    copy.write_bytes(corpus.read_bytes())
    assert prepare_data(override_config(config, [f"data.dataset={copy}"])).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "override",
    ["model.vocab_size=310", "model.max_seq_length=16", "data.validation_every=5", "data.max_quarantine_fraction=0.5"],
)
def test_what_changes_the_data_changes_the_fingerprint(config, override):
    assert prepare_data(override_config(config, [override])).fingerprint != prepare_data(config).fingerprint


@pytest.mark.parametrize(
    "override", ["training.seed=7", "data.train_samples=3", "training.batch_size=2", "data.num_workers=1"]
)
def test_what_does_not_change_the_data_does_not(config, override):
    assert prepare_data(override_config(config, [override])).fingerprint == prepare_data(config).fingerprint


def test_changed_content_is_prepared_anew(config, corpus):
    first = prepare_data(config)
    with corpus.open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    second = prepare_data(config)
    assert second.splits["validation"].documents + second.splits["train"].documents == 21
    assert second.path != first.path


def test_processes_that_prepare_the_same_data_at_once_all_succeed(config, tmp_path):
    save_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "config.yaml")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert len({output for output, _ in outputs}) == 1
    assert left_in(config) == [load_manifest(outputs[0][0].decode().strip()).fingerprint]


def test_what_is_written_does_not_depend_on_the_number_of_threads(config, tmp_path):
    alone = override_config(config, [f"data.cache_dir={tmp_path / 'alone'}"])
    save_config(alone, tmp_path / "config.yaml")
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "config.yaml")]
    subprocess.run(command, env=environment, capture_output=True, check=True)
    by_one, by_all = prepare_data(alone), prepare_data(config)
    names = sorted(path.relative_to(by_all.path) for path in by_all.path.rglob("*") if path.is_file())
    assert names
    assert all((by_one.path / name).read_bytes() == (by_all.path / name).read_bytes() for name in names)


def test_a_killed_preparation_leaves_nothing_that_is_taken_for_data(config, tmp_path, monkeypatch):
    script = "import ultrathink_model.data.build as p, os, signal\n"
    script += "p._sync_tree = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n" + PREPARE.replace("; ", "\n")
    save_config(config, tmp_path / "config.yaml")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "config.yaml")], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    (leftover,) = left_in(config)
    assert leftover.startswith(".")
    # All was written: nothing is read again.
    monkeypatch.setattr(build, "_fill_folder", None)
    manifest = prepare_data(config)
    assert left_in(config) == [manifest.fingerprint]
    assert not (manifest.path / "build.json").exists()


def test_a_failed_preparation_leaves_nothing(config, corpus):
    with corpus.open("a") as file:
        file.write("not json\n" * 5)
    with pytest.raises(DataError, match=r"5 of 25 rows .*row is JSON: 5 rows, as in corpus\.jsonl row 21"):
        prepare_data(config)
    assert left_in(config) == []


def test_quarantined_rows_are_kept_beside_the_shards(config, corpus):
    with corpus.open("a") as file:
        file.write("not json\n")
    manifest = prepare_data(override_config(config, ["data.max_quarantine_fraction=0.05"]))
    assert (manifest.quarantined, manifest.sources[0].rows) == (1, 21)
    row = json.loads((manifest.path / "quarantine.jsonl").read_text())
    assert row == {
        "source": manifest.sources[0].name,
        "file": "corpus.jsonl",
        "row": 21,
        "rule": "row is JSON",
        "excerpt": "not json",
    }


def test_a_file_that_grows_while_it_is_read_is_refused(config, corpus, monkeypatch):
    from ultrathink_model.data import build

    def grow(*arguments):
        with corpus.open("a") as file:
            file.write(json.dumps({"text": "late"}) + "\n")
        return choose(*arguments)

    choose = build.choose_tokenizer
    monkeypatch.setattr(build, "choose_tokenizer", grow)
    with pytest.raises(DataError, match="changed while it was read; start again"):
        prepare_data(config)
    assert left_in(config) == []


def test_a_mixture_keeps_each_source_apart(config, corpus):
    manifest = prepare_data(override_config(config, [f"data.mix_datasets=dummy:1,{corpus}:3"]))
    assert [(source.name, source.weight) for source in manifest.sources] == [("dummy", 0.25), (str(corpus), 0.75)]
    for split in ("train", "validation"):
        parts = [source.splits[split] for source in manifest.sources]
        assert manifest.splits[split].tokens == sum(part.tokens for part in parts)
        assert manifest.splits[split].sequences == sum(part.sequences for part in parts)


def test_a_tokenizer_can_be_taken_from_a_folder(config, tmp_path):
    first = prepare_data(config)
    taken = override_config(config, [f"data.tokenizer_name={first.tokenizer_folder}"])
    second = prepare_data(taken)
    assert second.tokenizer_hash == first.tokenizer_hash
    assert second.splits == first.splits
    with pytest.raises(TokenizerError, match=r"more than model\.vocab_size=260"):
        prepare_data(override_config(taken, ["model.vocab_size=260"]))


def test_large_vocabularies_take_wide_tokens(config):
    first = prepare_data(config)
    settings = first.tokenizer_folder / "tokenizer.json"
    values = json.loads(settings.read_text())
    token = {"id": 70_000, "content": "<|far|>", "special": True}
    values["model"]["vocab"]["<|far|>"] = 70_000
    values["added_tokens"].append(token | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False))
    far = first.path.parent / "far.json"
    far.write_text(json.dumps(values))
    manifest = prepare_data(override_config(config, [f"data.tokenizer_name={far}", "model.vocab_size=70016"]))
    assert (manifest.vocab_size, manifest.token_dtype) == (70_001, "uint32")
    assert manifest.splits == first.splits


def test_damaged_folders_are_refused_with_the_remedy(config):
    manifest = prepare_data(config)
    shard = manifest.path / manifest.sources[0].shards["train"][0].tokens_file
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"should hold \d+ bytes and holds \d+; delete .* and start again"):
        prepare_data(config)
    (manifest.path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="is not a manifest of this version"):
        load_manifest(manifest.path)
    with pytest.raises(DataError, match="holds no prepared data"):
        load_manifest(manifest.path.parent)


def test_a_prepared_folder_can_be_moved(config, tmp_path):
    manifest = prepare_data(config)
    moved = load_manifest(manifest.path.rename(tmp_path / "moved"))
    assert moved.path == tmp_path / "moved"
    assert moved.splits == manifest.splits


def test_a_cache_folder_that_cannot_be_written_is_refused(config, corpus):
    with pytest.raises(DataError, match=r"data\.cache_dir=.* cannot be written"):
        prepare_data(override_config(config, [f"data.cache_dir={corpus}/below"]))


def test_a_bad_mixture_leaves_no_folder(config):
    with pytest.raises(ConfigError):
        prepare_data(override_config(config, ["data.mix_datasets=dummy"]))
    assert not Path(config.data.cache_dir).exists()


KILLED = """
import os, signal, sys
from ultrathink_model.config import load_config
from ultrathink_model.data import build, prepare_data, tokenize
tokenize.BATCH_CHARACTERS, tokenize.NOTED_CHARACTERS = 200, 300
write, noted = tokenize.write_record, []
def write_and_die(record, values):
    write(record, values)
    noted.append(record)
    if len(noted) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
tokenize.write_record = write_and_die
prepare_data(load_config(sys.argv[1]))
"""


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_a_killed_preparation_goes_on_where_it_stopped_and_gives_the_same_files(
    config, corpus, tmp_path, monkeypatch, caplog, packing
):
    caplog.set_level(logging.INFO)
    config = override_config(config, [f"data.packing={packing}", "data.max_quarantine_fraction=0.1"])
    with corpus.open("a") as file:
        file.write("not json\n")
    save_config(config, tmp_path / "config.yaml")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "config.yaml")], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    encoded = []
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    cut = prepare_data(config)
    assert "going on with the preparation" in caplog.text
    assert "training a byte-level BPE" not in caplog.text
    # The first documents were not encoded again.
    assert 0 < len(encoded) < 20
    whole = prepare_data(override_config(config, [f"data.cache_dir={tmp_path / 'whole'}"]))
    assert cut.splits == whole.splits
    names = sorted(path.relative_to(whole.path) for path in whole.path.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(cut.path) for path in cut.path.rglob("*") if path.is_file())
    assert all((cut.path / name).read_bytes() == (whole.path / name).read_bytes() for name in names)


def test_a_source_that_was_finished_is_not_read_again(config, corpus, tmp_path, monkeypatch):
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text().replace("document", "other"))
    config = override_config(config, [f"data.mix_datasets={corpus}:0.5,{other}:0.5"])
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 200)
    monkeypatch.setattr(tokenize, "NOTED_CHARACTERS", 300)
    write = tokenize.write_record

    def write_until_the_second(record, values):
        write(record, values)
        if record.name == "progress_01.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenize, "write_record", write_until_the_second)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(config)
    monkeypatch.setattr(tokenize, "write_record", write)
    encoded = []
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    manifest = prepare_data(config)
    assert encoded
    assert all(text.startswith("other") for text in encoded)
    whole = prepare_data(override_config(config, [f"data.cache_dir={tmp_path / 'whole'}"]))
    assert manifest.model_copy(update={"path": whole.path}) == whole
    assert (manifest.path / "dataset_card.md").read_bytes() == (whole.path / "dataset_card.md").read_bytes()


def test_what_another_version_left_half_built_is_not_gone_on_with(config, caplog):
    caplog.set_level(logging.INFO)
    first = prepare_data(config)
    part = first.path.rename(first.path.with_name(f".{first.fingerprint}.part"))
    (part / "build.json").write_text('{"made_by": "0 0.0.0", "revisions": {}}')
    second = prepare_data(config)
    assert "going on with the preparation" not in caplog.text
    assert second.splits == first.splits


@pytest.mark.parametrize("streaming", [False, True])
def test_what_was_cut_short_of_the_hub_goes_on_at_the_same_revision_only(tmp_path, streaming):
    def ingredients(revision):
        source = HubSource("some", KnownDataset("some/texts", licence=""), streaming=streaming)
        source.__dict__["_reached"] = (revision, None if revision else "no network")
        return [Ingredient(DataSource(dataset="some", weight=1), source, source.identity())]

    part = tmp_path / ".half.part"
    _begin(part, ingredients("c0ffee"))
    (part / "shard").touch()
    _begin(part, ingredients("c0ffee"))
    assert (part / "shard").exists()
    with pytest.raises(SourceLostError, match=r"a part of data\.dataset=some, and the hub does not answer"):
        _begin(part, ingredients(None))
    assert (part / "shard").exists()
    _begin(part, ingredients("decaf"))
    assert not (part / "shard").exists()
    (part / "build.json").write_bytes(b"")  # cut short
    _begin(part, ingredients("decaf"))
    assert list(part.iterdir()) == [part / "build.json"]


def test_a_stream_whose_hub_is_lost_keeps_what_was_prepared(config, corpus, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 200)
    monkeypatch.setattr(tokenize, "NOTED_CHARACTERS", 300)
    rows = LocalSource.rows

    def lost_rows(self, split):
        for number, row in enumerate(rows(self, split)):
            if number == 15 and tokenize_begun:
                raise SourceLostError("the hub was lost")
            yield row

    tokenize_begun = []
    monkeypatch.setattr(LocalSource, "rows", lost_rows)
    monkeypatch.setattr(schema, "CHUNK_ROWS", 1)
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: tokenize_begun.append(1) or encode(self, texts))
    with pytest.raises(SourceLostError):
        prepare_data(config)
    monkeypatch.setattr(LocalSource, "rows", rows)
    encoded = []
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    manifest = prepare_data(config)
    assert "going on with the preparation" in caplog.text
    assert 0 < len(encoded) < 20
    assert manifest.splits["train"].documents + manifest.splits["validation"].documents == 20


def test_a_lost_hub_is_told_as_one_that_can_be_gone_on_with():
    def rows():
        yield {"text": "one"}
        raise ConnectionError("gone")

    source = HubSource("some", KnownDataset("some/texts", licence=""), streaming=False)
    source.__dict__["_splits"] = {"train": rows()}
    with pytest.raises(SourceLostError, match=r"some/texts:train: the hub was lost while it was read \(gone\)"):
        list(source.rows("train"))


def test_best_fit_rows_reach_the_loader_and_their_padding_is_told(config):
    from ultrathink_model.data import TrainLoader

    manifest = prepare_data(override_config(config, ["data.packing=best_fit"]))
    train = manifest.splits["train"]
    assert train.padding == train.sequences * 32 - train.tokens > 0
    loader = TrainLoader(manifest, override_config(config, ["training.batch_size=1"]))
    batches = [batch for _, step in zip(range(loader.steps_per_epoch), loader, strict=False) for batch in step]
    assert sum(batch.num_tokens for batch in batches) == train.tokens
    stream = prepare_data(config)
    assert stream.fingerprint != manifest.fingerprint
    assert stream.splits["train"].padding < 32
    assert stream.splits["train"].tokens == train.tokens


def test_the_card_tells_of_sources_sizes_lengths_duplicates_and_samples(config, corpus):
    with corpus.open("a") as file:
        file.write(json.dumps({"text": "document 3 document 3 document 3 document 3 "}) + "\n")
        file.write(json.dumps({"text": "<script>alert(1)</script> | bar"}) + "\n")
        file.write("not json\n")
    manifest = prepare_data(override_config(config, ["data.max_quarantine_fraction=0.1"]))
    assert manifest.sources[0].duplicates == 1
    card = (manifest.path / "dataset_card.md").read_text(encoding="utf-8")
    page = (manifest.path / "dataset_card.html").read_text(encoding="utf-8")
    for text in (card, page):
        assert manifest.fingerprint in text
        assert manifest.tokenizer_hash in text
        assert "not stated (local files)" in text
        assert manifest.sources[0].identity["sha256"] in text
        assert f"{manifest.splits['train'].tokens:,}" in text
        assert text.count("corpus.jsonl ") >= 20
    assert "<script" not in page
    documents = sum(info.documents for info in manifest.splits.values())
    from ultrathink_model.data.card import length_histogram

    histogram = length_histogram(manifest, manifest.path)
    assert sum(number for _, _, number in histogram) == documents == 22
    assert all(low <= high and high + 1 == 2 * low for low, high, _ in histogram)
