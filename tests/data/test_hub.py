"""Hub datasets, read from a hub that runs on this machine, in processes of their own: `datasets` reads its settings at import."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SILENT_HUB = "http://127.0.0.1:9"  # nothing listens there
ARTICLES = 30
FILES = 8
CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - {split: train, path: wikitext-2-raw-v1/train-*}
  - {split: validation, path: wikitext-2-raw-v1/validation-*}
- config_name: short
  data_files:
  - {split: train, path: short/train-*}
---
"""
# Each line of input is a list of overrides; each line of output the splits or the error, with the seconds that it took.
SCRIPT = """
import json, sys, time
from ultrathink_model.config import make_config
from ultrathink_model.data import build, prepare_data, tokenize
from ultrathink_model.errors import UltrathinkError
tokenize.BATCH_CHARACTERS = 500  # so that a stream of this size can stop early
begin, revisions = build._begin, []
build._begin = lambda part, found: (revisions.append([s.revision for s in (i.source for i in found) if hasattr(s, "revision")]), begin(part, found))
base = {"model": {"vocab_size": 300, "max_seq_length": 32}, "data": {"tokenizer_name": "train"}}
for line in sys.stdin:
    config = make_config(base, json.loads(line))
    start = time.monotonic()
    try:
        manifest = prepare_data(config)
        answer = {split: info.documents for split, info in manifest.splits.items()} | {"tokens": manifest.splits["train"].tokens}
        answer["revisions"] = revisions.pop() if revisions else None
    except UltrathinkError as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer | {"seconds": time.monotonic() - start}), flush=True)
"""


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(hub_folder):
    """The address of a hub with a dataset of wikitext's name and shape, one of several files, and one with another column
    and one split."""
    root = hub_folder
    wikitext = root / "Salesforce" / "wikitext"
    (wikitext / "wikitext-2-raw-v1").mkdir(parents=True)
    (wikitext / "README.md").write_text(CARD)
    for split, articles in (("train", ARTICLES), ("validation", 3)):
        lines = [
            line for n in range(articles) for line in ("", f" = {split} {n} = \n", "", f" text of {split} {n} \n" * 20)
        ]
        pq.write_table(
            pa.table({"text": lines}), wikitext / "wikitext-2-raw-v1" / f"{split}-00000.parquet", row_group_size=16
        )
    (wikitext / "short").mkdir()
    lines = [line for n in range(12) for line in (f" = short {n} = \n", f" a short text {n} \n" * 9)]
    pq.write_table(pa.table({"text": lines}), wikitext / "short" / "train-00000.parquet")
    texts = root / "long" / "texts"
    texts.mkdir(parents=True)
    for file in range(FILES):
        rows = [{"text": f"text {n} of file {file} " * (n + 1) if n != 5 else ""} for n in range(10)]
        (texts / f"train-{file:05d}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tables = root / "long" / "tables"
    tables.mkdir(parents=True)
    for name, files in (("train", FILES), ("validation", 2)):
        for file in range(files):
            rows = [f"{name} {n} of file {file} " * (n + 1) if n != 5 else "" for n in range(10)]
            pq.write_table(pa.table({"text": rows}), tables / f"{name}-{file:05d}.parquet", row_group_size=4)
    (root / "some" / "bodies").mkdir(parents=True)
    (root / "some" / "bodies" / "train.jsonl").write_text("".join(f'{{"body": "text {n}"}}\n' for n in range(20)))
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("hub_server.py")), str(root)], stdout=subprocess.PIPE, text=True
    )
    yield server.stdout.readline().strip()
    server.kill()
    server.wait()
    server.stdout.close()


# Streams a dataset in small batches, and is killed once so many notes were taken; says where the data are.
STREAM = """
import json, os, signal, sys
from ultrathink_model.config import make_config
from ultrathink_model.data import hub, prepare_data, tokenize
tokenize.BATCH_CHARACTERS, tokenize.NOTED_CHARACTERS, hub.STATE_ROWS = 300, 600, 4
write, notes = tokenize.write_record, []
def write_and_die(record, values):
    write(record, values)
    notes.append(record)
    if len(notes) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
tokenize.write_record = write_and_die
base = {"model": {"vocab_size": 300, "max_seq_length": 32}, "data": {"tokenizer_name": "train", "streaming": True}}
print(prepare_data(make_config(base, json.loads(sys.argv[2]))).path)
"""


def stream(endpoint, home, kill_after, *overrides):
    """Runs `STREAM` and gives how it ended."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", STREAM, str(kill_after), json.dumps(overrides)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("bounds", [(), ("data.train_samples=60",)])
def test_a_stream_that_was_cut_short_goes_on_from_the_file_that_it_had_come_to(hub, hub_folder, tmp_path, bounds):
    overrides = ["data.dataset=long/texts", "data.max_quarantine_fraction=0.2", *bounds]
    whole = stream(hub, tmp_path, -1, *overrides, f"data.cache_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    cut = (*overrides, f"data.cache_dir={tmp_path / 'cut'}")
    assert stream(hub, tmp_path, 6, *cut).returncode == -signal.SIGKILL
    asked = hub_folder.with_suffix(".log")
    asked.unlink()
    again = stream(hub, tmp_path, -1, *cut)
    assert again.returncode == 0, again.stderr
    read = {name for name in asked.read_text().split() if name.endswith(".jsonl")}
    assert f"train-{FILES - 1:05d}.jsonl" in read
    assert "train-00001.jsonl" not in read  # the first is asked for the data set's columns
    assert files_of(Path(again.stdout.strip())) == files_of(Path(whole.stdout.strip()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["long/texts", "long/tables"])
def test_a_stream_that_is_cut_short_again_and_again_ends_with_the_same_files(hub, tmp_path, name):
    overrides = [f"data.dataset={name}", "data.max_quarantine_fraction=0.2"]
    whole = stream(hub, tmp_path, -1, *overrides, f"data.cache_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    ends = [stream(hub, tmp_path, 2, *overrides, f"data.cache_dir={tmp_path / 'cut'}") for _ in range(3)]
    while ends[-1].returncode == -signal.SIGKILL:
        ends.append(stream(hub, tmp_path, 2, *overrides, f"data.cache_dir={tmp_path / 'cut'}"))
    assert ends[-1].returncode == 0, ends[-1].stderr
    assert len(ends) > 4
    assert files_of(Path(ends[-1].stdout.strip())) == files_of(Path(whole.stdout.strip()))


def run(endpoint, home, *requests):
    """Prepares data for each list of overrides in one process that knows the hub at `endpoint` and the cache in `home`."""
    home.mkdir(exist_ok=True)
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "NO_PROXY": "127.0.0.1"}
    lines = "".join(json.dumps(list(overrides)) + "\n" for overrides in requests)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=lines, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_hub_dataset_is_downloaded_streamed_and_then_found_in_the_cache(hub, tmp_path):
    wikitext, prepared = "data.dataset=wikitext", f"data.cache_dir={tmp_path / 'first'}"
    whole, streamed, few, subset, column, named, absent = run(
        hub,
        tmp_path / "home",
        [wikitext, prepared],
        [wikitext, "data.streaming=true", f"data.cache_dir={tmp_path / 'streamed'}"],
        [wikitext, "data.streaming=true", "data.train_samples=4", f"data.cache_dir={tmp_path / 'few'}"],
        [wikitext, "data.dataset_config=short", prepared],
        ["data.dataset=some/bodies", prepared],
        ["data.dataset=some/bodies", "data.text_column=body", prepared],
        ["data.dataset=some/absent", prepared],
    )
    assert (whole["train"], whole["validation"]) == (ARTICLES, 3)
    assert {key: streamed[key] for key in ("train", "validation", "tokens")} == {
        key: whole[key] for key in ("train", "validation", "tokens")
    }
    # Both hold to one revision; the server's is this.
    assert whole["revisions"] == streamed["revisions"] == ["c0ffee" + "0" * 34]
    assert few["validation"] == 3
    assert few["train"] < ARTICLES
    assert few["tokens"] >= 4 * 32
    assert (subset["train"], subset["validation"]) == (11, 1)
    assert "some/bodies:train has no column 'text' but body; set data.text_column" in column["error"]
    assert (named["train"], named["validation"]) == (18, 2)
    assert "some/absent is neither a file or folder here nor a dataset on the hub" in absent["error"]

    offline, again = run(
        SILENT_HUB, tmp_path / "home", [wikitext, prepared], [wikitext, f"data.cache_dir={tmp_path / 'again'}"]
    )
    assert offline["train"] == again["train"] == ARTICLES
    assert offline["seconds"] < 5


def test_without_network_and_copy_a_hub_name_fails_at_once_with_both_remedies(tmp_path):
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    answers = run(
        SILENT_HUB,
        tmp_path / "home",
        ["data.dataset=wikitext", cache],
        ["data.dataset=openwebtext", "data.streaming=true", cache],
        ["data.mix_datasets=sotu:1,some/where:1", cache],
    )
    for answer, hub_id in zip(answers, ("Salesforce/wikitext", "Skylion007/openwebtext", "some/where"), strict=True):
        error = answer["error"]
        assert error.startswith("DataError: data.dataset=")
        assert hub_id in error
        assert "the hub does not answer" in error
        assert "give a local copy (data.dataset=PATH" in error
        assert "start again with a network" in error
    # `datasets` alone would try again for 23 seconds; the first answer also holds the seconds of its import.
    assert answers[1]["seconds"] < 10
    # Only locks and no half-written data are left.
    assert all(path.suffix == ".lock" for path in (tmp_path / "cache").iterdir())
