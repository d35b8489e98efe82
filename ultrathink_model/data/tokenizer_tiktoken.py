"""The tokenizers that `tiktoken` brings, as fast tokenizers that `transformers` loads."""

import hashlib
import os
import tempfile
from pathlib import Path

import requests
import tiktoken
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ultrathink_model.data.tokenizer import END_OF_TEXT, Tokenizer
from ultrathink_model.errors import TokenizerError

REACH_SECONDS = 10.0

_HOST = "https://openaipublic.blob.core.windows.net"
FILES = {
    "cl100k_base": (f"{_HOST}/encodings/cl100k_base.tiktoken",),
    "gpt2": (f"{_HOST}/gpt-2/encodings/main/vocab.bpe", f"{_HOST}/gpt-2/encodings/main/encoder.json"),
}
# tiktoken writes its patterns with possessive quantifiers, which Oniguruma, the engine of `tokenizers`, reads
# otherwise ({1,3}+ repeats there). These match the same pieces; a test holds them to tiktoken's own.
PATTERNS = {
    "cl100k_base": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


def load_tiktoken(name: str) -> Tokenizer:
    """`cl100k_base` or `gpt2`, from tiktoken's cache or downloaded into it.

    Neither has a padding token: rows are padded with the end-of-text token.

    Raises:
        TokenizerError: The files are not in the cache, and cannot be downloaded.
    """
    _check_reachable(name)
    try:
        encoding = tiktoken.get_encoding(name)
    except (requests.RequestException, OSError, ValueError) as error:
        raise TokenizerError(_explain(name, str(error))) from None
    ranks = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    special = {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    return Tokenizer(_convert(ranks, special, PATTERNS[name]), eos_token=END_OF_TEXT)


def _convert(ranks: dict[bytes, int], special: dict[str, int], pattern: str) -> Backend:
    spelled = _spell_bytes()
    spelling = {token: "".join(spelled[byte] for byte in token) for token in ranks}
    vocabulary = {spelling[token]: rank for token, rank in ranks.items()}
    # Special tokens stand in the vocabulary too, so that they keep their ids where the vocabulary has holes.
    backend = Backend(models.BPE(vocabulary | special, _merges(ranks, spelling), ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    ordered = sorted(special, key=special.__getitem__)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ordered])
    return backend


def _merges(ranks: dict[bytes, int], spelling: dict[bytes, str]) -> list[tuple[str, str]]:
    """Every pair of tokens that join to a token, in the order of what they join to.

    tiktoken merges whichever neighbours make the token of least rank, so each way to cut a token in two is a merge.
    """
    return [
        (spelling[token[:cut]], spelling[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]


def _spell_bytes() -> list[str]:
    """The visible character that byte-level BPE writes for each byte (Radford et al. 2019)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    spelled = {byte: chr(byte) for byte in visible} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    return [spelled[byte] for byte in range(256)]


def _check_reachable(name: str) -> None:
    """Fails within seconds where tiktoken, which sets no time limit, could wait for minutes."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    cache = Path(tempfile.gettempdir(), "data-gym-cache") if folder is None else Path(folder)
    for url in FILES[name]:
        if (cache / hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()).is_file():
            continue
        try:
            requests.head(url, timeout=REACH_SECONDS)
        except requests.RequestException as error:
            raise TokenizerError(_explain(name, str(error))) from None


def _explain(name: str, reason: str) -> str:
    return (
        f"data.tokenizer_name={name} cannot be had: its files are not in tiktoken's cache (TIKTOKEN_CACHE_DIR) and cannot "
        f"be downloaded ({reason}). Start again with a network, name a tokenizer.json or a Hugging Face folder that you "
        "have, or set data.tokenizer_name=train to train one on the data."
    )
