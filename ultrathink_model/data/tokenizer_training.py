"""Training a byte-level BPE tokenizer on the training split."""

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from ultrathink_model.data.tokenizer import END_OF_TEXT, PAD, Tokenizer
from ultrathink_model.errors import TokenizerError

SPECIAL_TOKENS = (END_OF_TEXT, PAD)


def train_tokenizer(texts: Iterable[str], vocab_size: int, more_tokens: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids, the same for the same texts.

    Every byte is a token of its own, so that any text can be encoded and none is lost. Words are cut as GPT-2 cuts them
    (Radford et al. 2019). A small corpus can run out of pairs to merge before `vocab_size` is reached.

    Args:
        texts: The training documents, read once.
        vocab_size: Ids at most, special tokens and single bytes among them.
        more_tokens: Special tokens beside those of every tokenizer.

    Raises:
        TokenizerError: `vocab_size` has no room for the special tokens and the 256 bytes.
    """
    special = (*SPECIAL_TOKENS, *more_tokens)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(special) + len(alphabet)
    if vocab_size < least:
        raise TokenizerError(
            f"model.vocab_size={vocab_size} is too small for data.tokenizer_name=train: {len(alphabet)} bytes and "
            f"{len(special)} special tokens need {least}; set model.vocab_size to {least} or more."
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=alphabet,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return Tokenizer(backend, eos_token=END_OF_TEXT, pad_token=PAD)
