import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from media_rows import ROWS, media_config, png, wav, write_rows
from PIL import Image

from ultrathink_model.config import override_config, save_config
from ultrathink_model.data import Tokenizer, load_manifest, prepare_data
from ultrathink_model.data.hub import _undecoded
from ultrathink_model.data.manifest import MEDIA_FOLDER
from ultrathink_model.data.media_index import MediaIndex
from ultrathink_model.data.media_store import MediaStore, MediaWriter
from ultrathink_model.data.shards import TokenStream
from ultrathink_model.errors import ConfigError, DataError, TokenizerError
from ultrathink_model.media.audio import load_audio, log_mel
from ultrathink_model.media.image import load_image


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows")


@pytest.fixture
def config(tmp_path, rows):
    return media_config(tmp_path, f"data.dataset={rows}")


def expected_media(config, number):
    """What the n-th row of `write_rows` has, preprocessed, in the order of its placeholders."""
    settings = config.multimodal
    image = load_image(png(number), settings)
    sound = log_mel(load_audio(wav(number), settings), settings)
    return [[image], [sound], [sound, image, load_image(png(0), settings)], []][number % 4]


def test_the_stream_holds_a_run_of_tokens_for_each_medium_and_the_index_and_store_what_it_is(config):
    manifest = prepare_data(config)
    tokenizer = Tokenizer.load(manifest.tokenizer_folder)
    assert manifest.media.token_ids == tokenizer.media_ids
    store = MediaStore(manifest.path / MEDIA_FOLDER, manifest.media)
    held_out = [number for number in range(ROWS) if number % 10 == 9]
    for split, numbers in (
        ("validation", held_out),
        ("train", [number for number in range(ROWS) if number not in held_out]),
    ):
        shards = manifest.sources[0].shards[split]
        stream = TokenStream(manifest.path, shards, manifest.token_dtype)
        index = MediaIndex((manifest.path / shards[0].tokens_file).parent)
        tokens, ends = stream.read(0, len(stream))
        texts, places = [], []
        for number, (start, end) in zip(numbers, zip([0, *ends[:-1]], ends, strict=True), strict=True):
            runs = index.runs(int(start), int(end), 0)
            media = expected_media(config, number)
            for run, medium in zip(runs, media, strict=True):
                found = store.image(run.number) if run.kind == "image" else store.sound(run.number)
                # Log-mels are kept as float16, whose step below 2 is 0.001.
                np.testing.assert_allclose(found, medium, atol=0 if run.kind == "image" else 6e-4)
                assert (run.first, run.length) == (0, run.tokens)
                assert run.tokens == (16 if run.kind == "image" else number % 5 + 1)
                assert (tokens[start + run.place :][: run.length] == manifest.media.token_ids[run.kind]).all()
                places += range(start + run.place, start + run.place + run.length)
            texts.append(tokenizer.decode([*tokens[start : end - 1].tolist()]))
        is_medium = np.isin(tokens, list(manifest.media.token_ids.values()))
        assert np.flatnonzero(is_medium).tolist() == places
        lines = [json.loads(line)["text"] for line in Path(config.data.dataset, "rows.jsonl").read_text().splitlines()]
        written = [lines[number].replace("<image>", "").replace("<audio>", "") for number in numbers]
        assert texts == written
        size = manifest.splits[split]
        assert (size.tokens, size.media_tokens) == (int((~is_medium).sum()), int(is_medium.sum()))
        assert size.bytes == sum(len(text.encode()) for text in written)
    assert manifest.splits["train"].images == sum(
        1 + (n % 4 == 2) for n in range(ROWS) if n % 4 in {0, 2} and n % 10 != 9
    )


def test_each_different_medium_is_stored_once(config):
    manifest = prepare_data(config)
    assert (manifest.media.images, manifest.media.sounds) == (20, 20)
    page = (manifest.path / "dataset_card.html").read_text()
    assert "20 different images of 16 × 16 pixels and 20 sounds at 16000 Hz" in page
    assert 'src="data:image/png;base64,' in page
    assert "20 different images" in (manifest.path / "dataset_card.md").read_text()


def test_parquet_datasets_and_json_lines_give_the_same_data(config, rows, tmp_path):
    lines = [json.loads(line) for line in (rows / "rows.jsonl").read_text().splitlines()]
    table = {
        "text": [line["text"] for line in lines],
        "images": [[(rows / path).read_bytes() for path in line.get("images", [])] for line in lines],
        "audio": [[(rows / path).read_bytes() for path in line.get("audio", [])] or None for line in lines],
    }
    (tmp_path / "bytes").mkdir()
    pq.write_table(pa.table(table), tmp_path / "bytes" / "rows.parquet")
    # As `datasets` writes a column of images: structs of bytes and path.
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "audio": datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")}),
        }
    )
    structs = table | {
        "images": [[{"bytes": data, "path": None} for data in some] for some in table["images"]],
        "audio": [[{"bytes": data, "path": None} for data in some or []] for some in table["audio"]],
    }
    (tmp_path / "structs").mkdir()
    datasets.Dataset.from_dict(structs, features=features).to_parquet(tmp_path / "structs" / "rows.parquet")
    hub = datasets.Dataset.from_dict(structs, features=features)
    hub = hub.cast_column("audio", datasets.List(datasets.Audio()))
    for rows_of_hub in (hub, hub.to_iterable_dataset()):
        undecoded = list(_undecoded(rows_of_hub, media=True))
        assert [row["images"] for row in undecoded] == structs["images"]
        assert [row["audio"] for row in undecoded] == structs["audio"]
    first = prepare_data(config)
    for folder in ("bytes", "structs"):
        other = prepare_data(override_config(config, [f"data.dataset={tmp_path / folder}"]))
        assert other.fingerprint != first.fingerprint
        assert other.splits == first.splits
        for name in ("train/00/00000.bin", "train/00/media.bin", "media/images.bin", "media/audio.bin"):
            assert (other.path / name).read_bytes() == (first.path / name).read_bytes()


def test_a_path_that_is_no_text_is_a_bad_row(config, tmp_path):
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], "<i4").tobytes()), pa.py_buffer(b"\xff\xfe")]
    )
    paths = pa.ListArray.from_arrays(pa.array([0, 1]), broken)
    (tmp_path / "broken").mkdir()
    table = pa.table({"text": pa.array(["<image> a"]), "images": paths})
    good = pa.table({"text": ["one more", "and another"], "images": pa.array([[], []], pa.list_(pa.string()))})
    pq.write_table(pa.concat_tables([table, good]), tmp_path / "broken" / "rows.parquet")
    manifest = prepare_data(override_config(config, [f"data.dataset={tmp_path / 'broken'}"]))
    assert json.loads((manifest.path / "quarantine.jsonl").read_text())["rule"] == "row is UTF-8"


def bomb() -> bytes:
    stream = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(stream, "PNG")
    return stream.getvalue()


def test_rows_whose_media_cannot_be_used_are_quarantined_with_file_row_and_rule(config, rows, tmp_path):
    (tmp_path / "secret.png").write_bytes(png(1))
    (rows / "link.png").symlink_to(tmp_path / "secret.png")
    (rows / "loop.png").symlink_to(rows / "loop.png")
    (rows / "folder").symlink_to(tmp_path)
    (rows / "cut.png").write_bytes(png(3)[:60])
    (rows / "bomb.png").write_bytes(bomb())
    (rows / "text.wav").write_text("no sound")
    os.mkfifo(rows / "pipe.png")
    bad = [
        ({"text": "<image>"}, "text has as many <image> as images"),
        ({"text": "<image> <image>", "images": ["media/0.png"]}, "text has as many <image> as images"),
        ({"text": "a", "audio": ["media/0.wav"]}, "text has as many <audio> as audio"),
        ({"text": "<image>", "images": [3]}, "images is a list of paths or bytes"),
        ({"text": "<image>", "images": {"path": 7}}, "images is a list of paths or bytes"),
        ({"text": 5, "images": []}, "text is a string"),
        ({"text": "<image>", "images": ["no.png"]}, "medium is a file"),
        ({"text": "<image>", "images": ["media"]}, "medium is a file"),
        ({"text": "<image>", "images": ["pipe.png"]}, "medium is a file"),
        ({"text": "<image>", "images": ["loop.png"]}, "medium is a file"),
        ({"text": "<image>", "images": ["a\0b"]}, "medium is a file"),
        ({"text": "<image>", "images": ["x" * 5000]}, "medium is a file"),
        ({"text": "<image>", "images": ["../secret.png"]}, "medium lies within the dataset's folder"),
        ({"text": "<image>", "images": [str(tmp_path / "secret.png")]}, "medium lies within the dataset's folder"),
        ({"text": "<image>", "images": ["link.png"]}, "medium lies within the dataset's folder"),
        ({"text": "<image>", "images": ["folder/secret.png"]}, "medium lies within the dataset's folder"),
        ({"text": "<image>", "images": ["cut.png"]}, "image can be read as PNG, JPEG, WEBP, GIF, BMP, TIFF"),
        ({"text": "<image>", "images": ["media/0.wav"]}, "image can be read as PNG, JPEG, WEBP, GIF, BMP, TIFF"),
        ({"text": "<image>", "images": ["bomb.png"]}, "image has at most 67108864 pixels"),
        ({"text": "<audio>", "audio": ["text.wav"]}, "sound can be read"),
        ({"text": "<image> <audio>", "images": ["media/0.png"], "audio": ["media/0.png"]}, "sound can be read"),
    ]
    with (rows / "rows.jsonl").open("a") as file:
        file.write("\n" + "\n".join(json.dumps(row) for row, _ in bad))
    manifest = prepare_data(config)
    # The link to a folder outside is a bad row of its own.
    assert manifest.quarantined == len(bad) + 1
    link, *lines = [json.loads(line) for line in (manifest.path / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["file"], line["row"], line["rule"]) for line in lines] == [
        ("rows.jsonl", ROWS + number, rule) for number, (_, rule) in enumerate(bad, start=1)
    ]
    assert (link["file"], link["rule"]) == ("folder", "file lies within the folder")
    assert "bomb.png: " in lines[18]["excerpt"]
    with pytest.raises(DataError, match=r"more than data\.max_quarantine_fraction=0\.1"):
        prepare_data(override_config(config, ["data.max_quarantine_fraction=0.1"]))


def test_without_the_feature_placeholders_are_text_and_columns_are_not_read(config, rows):
    plain = prepare_data(override_config(config, ["advanced.enable_multimodal=false"]))
    assert plain.media is None
    assert plain.splits["train"].media_tokens == 0
    assert not (plain.path / MEDIA_FOLDER).exists()
    tokenizer = Tokenizer.load(plain.tokenizer_folder)
    assert tokenizer.media_ids == {}
    assert tokenizer.decode(tokenizer.encode("an <image> here")) == "an <image> here"


def test_text_that_merely_spells_another_special_token_is_text(config, rows):
    manifest = prepare_data(config)
    tokenizer = Tokenizer.load(manifest.tokenizer_folder)
    assert not {manifest.eos_id, *manifest.media.token_ids.values()} & set(tokenizer.encode("<|endoftext|> <image>"))


def test_another_image_under_the_same_name_is_other_data(config, rows):
    first = prepare_data(config)
    assert prepare_data(config).fingerprint == first.fingerprint
    (rows / "media" / "0.png").write_bytes(png(200))
    assert prepare_data(config).fingerprint != first.fingerprint
    (rows / "media" / "0.png").unlink()
    assert prepare_data(config).quarantined == 1 + sum(n % 4 == 2 for n in range(ROWS))


def test_what_shapes_the_media_names_the_data(config):
    names = {prepare_data(config).fingerprint}
    for override in (
        "multimodal.image_size=20",
        "multimodal.patch_size=8",
        "multimodal.audio_stack=5",
        "multimodal.mel_bins=20",
        "multimodal.image_mean=[0.1, 0.2, 0.3]",
        "multimodal.audio_sample_rate=8000",
    ):
        names.add(prepare_data(override_config(config, [override])).fingerprint)
    assert len(names) == 7


def test_a_given_tokenizer_gets_the_tokens_and_its_room_is_checked(config, tmp_path):
    plain = prepare_data(override_config(config, ["advanced.enable_multimodal=false", "model.vocab_size=300"]))
    given = plain.path / "tokenizer"
    size = Tokenizer.load(given).vocab_size
    overrides = [f"data.tokenizer_name={given}", f"model.vocab_size={size + 2}"]
    manifest = prepare_data(override_config(config, overrides))
    assert manifest.media.token_ids == {"image": size, "audio": size + 1}
    with pytest.raises(TokenizerError, match=f"has {size + 2} ids, which is 1 more than model.vocab_size={size + 1}"):
        prepare_data(override_config(config, [overrides[0], f"model.vocab_size={size + 1}"]))
    # One that has them keeps them.
    again = prepare_data(override_config(config, [f"data.tokenizer_name={manifest.tokenizer_folder}"]))
    assert again.tokenizer_hash == manifest.tokenizer_hash


def test_a_lone_row_with_an_image_is_not_cut_in_two(config, tmp_path):
    (tmp_path / "one").mkdir()
    pq.write_table(pa.table({"text": ["a <image> b"], "images": [[png(1)]]}), tmp_path / "one" / "rows.parquet")
    with pytest.raises(DataError, match="0 training and 1 validation"):
        prepare_data(override_config(config, [f"data.dataset={tmp_path / 'one'}"]))


def test_cleaning_is_refused_for_what_it_cannot_see(config):
    with pytest.raises(ConfigError, match="cleaning"):
        override_config(config, ["cleaning.exact_dedup=true"])


def test_a_store_that_was_cut_off_is_gone_on_with(config, tmp_path):
    settings = config.multimodal
    with MediaWriter(tmp_path / "whole", settings) as whole, MediaWriter(tmp_path / "cut", settings) as writer:
        for number in range(4):
            for kind, data in (("image", png(number)), ("audio", wav(number))):
                whole.add(kind, data)
                writer.add(kind, data)
            if number == 1:
                writer.sync()
        # As a kill leaves it: data beyond the last digest, and a torn digest.
        shutil.copytree(tmp_path / "cut", tmp_path / "killed")
    for name, tail in (
        ("images.bin", b"x" * 100),
        ("audio.bin", b"y"),
        ("images.ends", b"z" * 8),
        ("audio.sha256", b"q"),
    ):
        with (tmp_path / "killed" / name).open("ab") as file:
            file.write(tail)
    with MediaWriter(tmp_path / "killed", settings) as again:
        assert again.counts == (2, 2)
        numbers = [again.add("image", png(number)).number for number in range(4)]
        numbers += [again.add("audio", wav(number)).number for number in range(4)]
    assert numbers == [*range(4), *range(4)]
    assert again.counts == whole.counts == (4, 4)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ["media/images.bin", "media/audio.ends", "train/00/media.bin"])
def test_a_prepared_folder_that_lacks_a_part_of_its_media_is_refused(config, name):
    file = prepare_data(config).path / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"should hold .* bytes and holds .* delete .* and start again"):
        prepare_data(config)


PREPARE = """
import os, signal, sys
from ultrathink_model.config import load_config
from ultrathink_model.data import prepare_data, media_store, tokenize
media_store.UNSYNCED_BYTES = tokenize.NOTED_CHARACTERS = 200
tokenize.BATCH_CHARACTERS = 100
seen, limit, write = 0, int(sys.argv[2]), tokenize.write_record
def count(*arguments):
    global seen
    write(*arguments)
    seen += 1
    if seen == limit:
        os.kill(os.getpid(), signal.SIGKILL)
tokenize.write_record = count
print(prepare_data(load_config(sys.argv[1])).path)
"""


def test_a_killed_preparation_goes_on_to_the_same_data(config, tmp_path):
    whole = prepare_data(config)
    killed = override_config(config, [f"data.cache_dir={tmp_path / 'other'}"])
    save_config(killed, tmp_path / "killed.yaml")
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "killed.yaml")]
    assert subprocess.run([*command, "2"], check=False).returncode == -signal.SIGKILL
    parts = list((tmp_path / "other").glob(".*.part/progress_00.json"))
    assert json.loads(parts[0].read_text())["sizes"]["train"]["images"] > 0
    finished = subprocess.run([*command, "-1"], check=True, capture_output=True, text=True)
    manifest = load_manifest(finished.stdout.strip())
    assert manifest.model_copy(update={"path": whole.path}) == whole
    for file in [path for path in whole.path.rglob("*") if path.is_file()]:
        assert (manifest.path / file.relative_to(whole.path)).read_bytes() == file.read_bytes()
