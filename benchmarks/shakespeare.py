"""Tiny-shakespeare by characters, as both sides of a comparison read it: a tokenizer and the two files.

The first 90 % of the text are trained on, the last 10 % validate, as nanoGPT cuts it. The text is not part of this
project: `--text` names the file (input.txt of Karpathy's char-rnn).
"""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from ultrathink_model.data.tokenizer import END_OF_TEXT

TRAIN_SHARE = 0.9


def read_splits(text_file: Path) -> tuple[str, str]:
    """The training and the validation text."""
    text = text_file.read_text(encoding="utf-8")
    cut = int(TRAIN_SHARE * len(text))
    return text[:cut], text[cut:]


def prepare(text_file: Path, folder: Path) -> tuple[Path, Path]:
    """Writes what a run of ours takes: `data.dataset` and `data.tokenizer_name`."""
    train, validation = read_splits(text_file)
    data, tokenizer = folder / "text", folder / "tokenizer"
    for path in (data, tokenizer):
        path.mkdir(parents=True, exist_ok=True)
    (data / "train.txt").write_text(train, encoding="utf-8")
    (data / "validation.txt").write_text(validation, encoding="utf-8")
    character_tokenizer(train + validation).save(str(tokenizer / "tokenizer.json"))
    return data, tokenizer


def character_tokenizer(text: str) -> Tokenizer:
    """One id for each character of a text, and one for its end."""
    vocabulary = {character: number for number, character in enumerate(sorted(set(text)))}
    vocabulary[END_OF_TEXT] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer
