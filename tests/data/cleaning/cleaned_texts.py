"""What the tests of cleaning do with texts and with the folders that are made of them."""

import random

from ultrathink_model.data import Tokenizer
from ultrathink_model.data.shards import TokenStream

ALL_STAGES = ("cleaning.repair=true", "cleaning.exact_dedup=true", "cleaning.minhash_dedup=true")


def edit(text, share, seed):
    """The text with a share of its words changed."""
    words = text.split()
    for place in random.Random(seed).sample(range(len(words)), round(share * len(words))):
        words[place] = f"other{place}"
    return " ".join(words)


def read(manifest, split):
    """The documents of a prepared split."""
    tokenizer = Tokenizer.load(manifest.tokenizer_folder)
    stream = TokenStream(manifest.path, manifest.sources[0].shards[split], manifest.token_dtype)
    tokens, ends = stream.read(0, len(stream))
    starts = [0, *ends.tolist()]
    return [tokenizer.decode(tokens[a : b - 1].tolist()) for a, b in zip(starts, ends.tolist(), strict=False)]


def content(manifest):
    """Every file of the prepared folder."""
    return {path.relative_to(manifest.path): path.read_bytes() for path in manifest.path.rglob("*") if path.is_file()}
