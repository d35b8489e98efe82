"""The tokenizer's files in a model folder: which they are, and what a model must know of them."""

import json
from pathlib import Path

import tokenizers

from ultrathink_model.errors import CheckpointError
from ultrathink_model.media.placeholders import PLACEHOLDERS

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
OPTIONAL_FILES = (SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE_FILE)


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files of a folder.

    Raises:
        CheckpointError: There is no `tokenizer.json`.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        raise CheckpointError(f"{folder} holds no {TOKENIZER_FILE}; prepare the data again, which writes it.")
    return [folder / name for name in (TOKENIZER_FILE, *OPTIONAL_FILES) if (folder / name).is_file()]


def special_ids(folder: Path) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, as far as the tokenizer names such tokens."""
    settings_file = folder / SETTINGS_FILE
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    known = vocabulary(folder)
    ids = {}
    for name in ("bos", "eos", "pad"):
        token = settings.get(f"{name}_token")
        text = token["content"] if isinstance(token, dict) else token
        if text in known:
            ids[f"{name}_token_id"] = known[text]
    return ids


def placeholder_ids(folder: Path) -> dict[str, int | None]:
    """`image_token_id` and `audio_token_id`; None where the tokenizer has no such token."""
    known = vocabulary(folder)
    return {f"{kind}_token_id": known.get(token) for kind, token in PLACEHOLDERS.items()}


def vocabulary(folder: Path) -> dict[str, int]:
    """The id of each token, added ones too."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return ids
