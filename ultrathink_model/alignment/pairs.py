"""Preference pairs as tokens: recorded ones, or self-play between the corpus and the model."""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch.distributed as dist

from ultrathink_model.alignment.draws import SELF_PLAY, make_generator
from ultrathink_model.alignment.sequences import pad_prompts
from ultrathink_model.config import Config
from ultrathink_model.data.loader import TrainLoader
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.pack import IGNORED
from ultrathink_model.data.preferences import COLUMNS, PreferencePair, load_preferences
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.distributed.context import RankContext
from ultrathink_model.errors import DataError
from ultrathink_model.models.generation import generate
from ultrathink_model.models.transformer import Transformer
from ultrathink_model.tracking.run_folder import write_atomically

SELF_PLAY_BATCH = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenPair:
    """A prompt with the response that is preferred and the one that is not, as tokens; see `PreferencePair`."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True)
class PairSplit:
    """Pairs to learn from, and pairs of other prompts to measure on."""

    train: list[TokenPair]
    held_out: list[TokenPair]


def make_pairs(
    config: Config, manifest: DataManifest, tokenizer: Tokenizer, model: Transformer, context: RankContext
) -> PairSplit:
    """The pairs that `rlhf.preference_data` names or, without it, self-play pairs; the same on every rank.

    Raises:
        DataError: A recorded pair is bad, or there are too few to learn from and to measure on.
    """
    if config.rlhf.preference_data is None:
        pairs = self_play_pairs(config, manifest, model, context)
        count = max(1, round(config.rlhf.holdout_fraction * len(pairs)))
        split = PairSplit(train=pairs[count:], held_out=pairs[:count])
    else:
        recorded = load_preferences(
            config.rlhf.preference_data, config.rlhf.holdout_fraction, config.data.max_quarantine_fraction
        )
        for row in recorded.quarantined:
            logger.warning("rlhf.preference_data: a row is left out: %s", row)
        split = PairSplit(
            tokenize_pairs(recorded.train, tokenizer, config), tokenize_pairs(recorded.heldout, tokenizer, config)
        )
    if not split.train or not split.held_out:
        raise DataError(
            f"{len(split.train)} preference pairs are left to learn from and {len(split.held_out)} to measure on, and "
            "both need at least one; give more prompts, or change rlhf.holdout_fraction or rlhf.response_tokens"
        )
    return split


def self_play_pairs(
    config: Config, manifest: DataManifest, model: Transformer, context: RankContext
) -> list[TokenPair]:
    """Pairs of the corpus's continuation of a prompt, preferred, and the model's own (SPIN, arXiv 2401.01335).

    Every prompt and its continuation are tokens of the training split that no other pair holds. The draws do not
    depend on the number of ranks. A sample that equals the corpus's continuation makes no pair.

    Args:
        config: `rlhf.num_pairs`, `prompt_tokens` and `response_tokens`.
        manifest: Prepared data.
        model: The model that the policy starts from.
        context: The ranks share the generation.

    Raises:
        DataError: The training split does not hold `rlhf.num_pairs` windows within single documents.
    """
    rlhf = config.rlhf
    windows = list(islice(corpus_windows(config, manifest), rlhf.num_pairs))
    if len(windows) < rlhf.num_pairs:
        raise DataError(
            f"the training split holds {len(windows)} separate windows of {rlhf.prompt_tokens} + {rlhf.response_tokens} "
            f"tokens within single documents, fewer than rlhf.num_pairs={rlhf.num_pairs}; lower one of the three"
        )
    starts = range(0, len(windows), SELF_PLAY_BATCH)
    own = {
        start: _continue_windows(windows[start : start + SELF_PLAY_BATCH], start, config, manifest, model, context)
        for start in list(starts)[context.rank :: context.world_size]
    }
    gathered = _gathered(own, context)
    pairs = [pair for start in starts for pair in gathered[start]]
    kept = [pair for pair in pairs if pair.chosen != pair.rejected]
    if len(kept) < len(pairs):
        logger.warning("%d self-play samples equal the corpus's continuation and make no pair", len(pairs) - len(kept))
    return kept


def corpus_windows(config: Config, manifest: DataManifest) -> Iterator[list[int]]:
    """Stretches of prompt and continuation from the training split, in its shuffled order, none overlapping another.

    A row of the corpus gives its first window in the first pass over the split, its second in the next.
    """
    length = config.rlhf.prompt_tokens + config.rlhf.response_tokens
    loader = TrainLoader(manifest, config)
    rows = ((batch, row) for step in loader for batch in step for row in range(len(batch.input_ids)))
    seen: set[tuple[int, ...]] = set()  # a mixture repeats the rows of a source whose weight passes its size
    for slot in range(config.model.max_seq_length // length):
        place = slice(slot * length, (slot + 1) * length)
        for batch, row in islice(rows, loader.epoch_sequences):
            documents = batch.document_ids
            in_one_document = documents is None or bool((documents[row, place] == documents[row, place][0]).all())
            window = batch.input_ids[row, place].tolist()
            if in_one_document and bool((batch.labels[row, place] != IGNORED).all()) and tuple(window) not in seen:
                seen.add(tuple(window))
                yield window


def tokenize_pairs(pairs: Iterable[PreferencePair], tokenizer: Tokenizer, config: Config) -> list[TokenPair]:
    """Recorded pairs as tokens, cut to the lengths of the config.

    A prompt keeps its last `rlhf.prompt_tokens` tokens, after the token that opens a document; a response keeps its
    first `rlhf.response_tokens`, the end-of-text token among them. Pairs whose sides are equal after the cut are left
    out, and counted in the log.
    """
    rlhf = config.rlhf
    tokenized, equal = [], 0
    for pair in pairs:
        prompt = [tokenizer.bos_id, *tokenizer.encode(pair.prompt)][-rlhf.prompt_tokens :]
        chosen, rejected = (
            [*tokenizer.encode(side), tokenizer.eos_id][: rlhf.response_tokens] for side in (pair.chosen, pair.rejected)
        )
        if chosen == rejected:
            equal += 1
        else:
            tokenized.append(TokenPair(prompt, chosen, rejected, pair.margin, pair.weight))
    if equal:
        logger.warning(
            "%d of %d preference pairs have the same first rlhf.response_tokens=%d tokens on both sides and are left out",
            equal,
            equal + len(tokenized),
            rlhf.response_tokens,
        )
    return tokenized


def save_pairs(split: PairSplit, tokenizer: Tokenizer, path: Path) -> None:
    """Writes pairs as JSON lines, for the reader as text and for a resumed run as tokens."""
    lines = []
    for name, pairs in (("train", split.train), ("held_out", split.held_out)):
        for pair in pairs:
            sides = {key: getattr(pair, key) for key in COLUMNS}
            texts = {key: tokenizer.decode(ids, skip_special_tokens=False) for key, ids in sides.items()}
            tokens = {f"{key}_tokens": ids for key, ids in sides.items()}
            numbers = {"margin": pair.margin, "weight": pair.weight}
            lines.append(json.dumps({"split": name, **texts, **tokens, **numbers}, ensure_ascii=False))
    write_atomically(path, "\n".join(lines) + "\n")


def load_pairs(path: Path) -> PairSplit:
    """Reads what `save_pairs` wrote."""
    split = PairSplit([], [])
    for line in path.read_bytes().splitlines():  # of bytes: text may hold other line ends than the newline
        values = json.loads(line)
        sides = {key: values[f"{key}_tokens"] for key in COLUMNS}
        pair = TokenPair(**sides, margin=values["margin"], weight=values["weight"])
        (split.train if values["split"] == "train" else split.held_out).append(pair)
    return split


def _continue_windows(
    windows: list[list[int]],
    number: int,
    config: Config,
    manifest: DataManifest,
    model: Transformer,
    context: RankContext,
) -> list[TokenPair]:
    """The windows as pairs, with the model's continuation beside the corpus's."""
    rlhf = config.rlhf
    prompts, mask = pad_prompts([window[: rlhf.prompt_tokens] for window in windows], manifest.pad_id, context.device)
    generation = generate(
        model,
        prompts,
        attention_mask=mask,
        max_new_tokens=rlhf.response_tokens,
        temperature=rlhf.temperature,
        top_p=rlhf.top_p,
        stop_token_ids=(manifest.eos_id,),
        pad_token_id=manifest.pad_id,
        generator=make_generator(config.training.seed, SELF_PLAY, number),
    )
    own = [tokens[kept].tolist() for tokens, kept in zip(generation.tokens, generation.mask, strict=True)]
    cut = rlhf.prompt_tokens
    return [TokenPair(window[:cut], window[cut:], rejected) for window, rejected in zip(windows, own, strict=True)]


def _gathered(own: dict[int, list[TokenPair]], context: RankContext) -> dict[int, list[TokenPair]]:
    """The entries of every rank together."""
    if context.world_size == 1:
        return own
    parts: list[dict[int, list[TokenPair]]] = [{} for _ in range(context.world_size)]
    dist.all_gather_object(parts, own)
    return {start: pairs for part in parts for start, pairs in part.items()}
