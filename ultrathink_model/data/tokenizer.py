"""The tokenizer: text to ids and back, saved as files that `transformers` loads without code of ours."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ultrathink_model.errors import TokenizerError
from ultrathink_model.media.placeholders import MEDIA_TOKENS, PLACEHOLDERS, Kind

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"


class Tokenizer:
    """A fast tokenizer with its end-of-text and padding tokens.

    Text that spells a special token is encoded as ordinary text: a corpus cannot end a document by quoting one.

    Args:
        backend: The tokenizer of the `tokenizers` library.
        eos_token: Ends each document, and opens the next one.
        bos_token: Opens a document where the model's files name such a token; null takes `eos_token`.
        pad_token: Fills ragged rows, never predicted; null takes `eos_token`.
        chat_template: Carried along into the saved files.

    Raises:
        TokenizerError: A named special token is not in the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_token: str,
        bos_token: str | None = None,
        pad_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._file_text = self._backend.to_str(pretty=False)
        # Not part of the saved file: there, `transformers` decides how prompts that spell special tokens are read.
        self._backend.encode_special_tokens = True
        self._settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos_token or eos_token,
            "eos_token": eos_token,
            "pad_token": pad_token or eos_token,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**30,
        } | ({"chat_template": chat_template} if chat_template else {})
        self.eos_id, self.bos_id, self.pad_id = (self._id_of(f"{name}_token") for name in ("eos", "bos", "pad"))
        # The greatest id, since some vocabularies (cl100k_base) have holes in them.
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def media_ids(self) -> dict[Kind, int]:
        """The ids of the tokens of images and sounds; empty for a tokenizer without them."""
        added = {token.content: number for number, token in self._backend.get_added_tokens_decoder().items()}
        return {kind: added[token] for kind, token in PLACEHOLDERS.items() if token in added}

    def with_media(self) -> "Tokenizer":
        """This tokenizer with `<image>` and `<audio>` among its special tokens."""
        backend = tokenizers.Tokenizer.from_str(self._file_text)
        backend.add_special_tokens(
            [tokenizers.AddedToken(token, special=True, normalized=False) for token in MEDIA_TOKENS]
        )
        eos, bos, pad = (self._settings[f"{name}_token"] for name in ("eos", "bos", "pad"))
        return Tokenizer(backend, eos, bos, pad, self._settings.get("chat_template"))

    @property
    def hash(self) -> str:
        """SHA-256 of the tokenizer's files."""
        text = self._file_text + json.dumps(self._settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, on all processors."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer.from_pretrained` loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER_FILE).write_text(self._file_text, encoding="utf-8")
        (folder / SETTINGS_FILE).write_text(json.dumps(self._settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a Hugging Face tokenizer folder or a lone `tokenizer.json`.

        Raises:
            TokenizerError: There is no tokenizer, it cannot be read, or no end-of-text token can be told.
        """
        path = Path(path)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        try:
            text = file.read_text(encoding="utf-8")
            backend = tokenizers.Tokenizer.from_str(text)
        except OSError as error:
            raise TokenizerError(
                f"tokenizer {path}: {file}: {error.strerror}; name a tokenizer.json, or a folder that holds one."
            ) from None
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception
            raise TokenizerError(f"{file} is not a tokenizer.json of the tokenizers library: {error}") from None
        settings = _read_settings(file.parent)
        eos_token = settings.get("eos_token") or _guess_end_of_text(backend, file)
        return cls(
            backend, eos_token, settings.get("bos_token"), settings.get("pad_token"), settings.get("chat_template")
        )

    def _id_of(self, name: str) -> int:
        token = str(self._settings[name])
        number = self._backend.token_to_id(token)
        if number is None:
            raise TokenizerError(f"the tokenizer's {name} {token!r} is not in its vocabulary; correct {SETTINGS_FILE}.")
        return number


def check_fits(tokenizer_size: int, vocab_size: int, name: str) -> None:
    """Refuses a tokenizer whose ids the model's embedding does not hold.

    Raises:
        TokenizerError: The tokenizer has more ids than `model.vocab_size`.
    """
    if tokenizer_size > vocab_size:
        raise TokenizerError(
            f"data.tokenizer_name={name} has {tokenizer_size} ids, which is {tokenizer_size - vocab_size} more "
            f"than model.vocab_size={vocab_size}; set model.vocab_size to {-(-tokenizer_size // 64) * 64} or more."
        )


def _read_settings(folder: Path) -> dict[str, str]:
    """The names of the special tokens from the files of a Hugging Face folder, as far as they are there."""
    merged: dict[str, str] = {}
    for name in ("special_tokens_map.json", SETTINGS_FILE):
        file = folder / name
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TokenizerError(f"{file} is not JSON in UTF-8: {error}") from None
        for key in ("bos_token", "eos_token", "pad_token", "chat_template"):
            value = values.get(key)
            token = value.get("content") if isinstance(value, dict) else value
            if isinstance(token, str):
                merged[key] = token
    template = folder / "chat_template.jinja"
    if template.is_file():
        merged["chat_template"] = template.read_text(encoding="utf-8")
    return merged


def _guess_end_of_text(backend: tokenizers.Tokenizer, file: Path) -> str:
    known = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
    for token in known:
        if backend.token_to_id(token) is not None:
            return token
    raise TokenizerError(
        f"{file} names no end-of-text token and has none of {', '.join(known)}; put a {SETTINGS_FILE} with "
        '{"eos_token": …} beside it.'
    )
