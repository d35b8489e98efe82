"""Texts labelled for harm: read or built in, split, and packed into rows beside the batches of the corpus."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ultrathink_model.config import Config
from ultrathink_model.config.model import HARM_CATEGORIES
from ultrathink_model.data.batch import NO_GROUP, Batch
from ultrathink_model.data.document import BadRow, make_excerpt
from ultrathink_model.data.json_lines import read_json_lines
from ultrathink_model.data.manifest import DataManifest
from ultrathink_model.data.order import mix, permute
from ultrathink_model.data.pack import IGNORED
from ultrathink_model.data.tokenizer import Tokenizer
from ultrathink_model.errors import DataError

BUILT_IN = "safety_topics.yaml"
# Keeps the order of labelled rows apart from that of the corpus.
SAFETY_ORDER = 0x5AFE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledText:
    """A text with the categories of harm that apply to it; none for a harmless one.

    Attributes:
        text: The text.
        categories: Names from `HARM_CATEGORIES`.
        topic: What decides on which side of the split it falls: texts of one topic stay together.
    """

    text: str
    categories: tuple[str, ...]
    topic: str

    @property
    def bits(self) -> int:
        """Bit c is set where category c applies."""
        return sum(1 << HARM_CATEGORIES.index(name) for name in self.categories)


@dataclass(frozen=True)
class SafetyTexts:
    """Labelled texts to learn from, others to measure on, and the rows that were refused."""

    train: list[LabelledText]
    held_out: list[LabelledText]
    quarantined: list[BadRow]


def load_safety_texts(config: Config) -> SafetyTexts:
    """The labelled texts that `constitutional.safety_data` names, or the built-in ones.

    Raises:
        DataError: The file cannot be read, has too many bad rows, or a category has no text on one side of the split.
    """
    section = config.constitutional
    texts, bad = (_built_in(), []) if section.safety_data is None else _read(Path(section.safety_data))
    rows, allowed = len(texts) + len(bad), config.data.max_quarantine_fraction
    if len(bad) > allowed * rows:
        raise DataError(
            f"constitutional.safety_data={section.safety_data}: {len(bad)} of {rows} rows cannot be used, more than "
            f"data.max_quarantine_fraction={allowed:g}; row {bad[0].row}: {bad[0].rule}. Mend the rows, or raise the "
            "fraction."
        )
    train, held_out = _split(texts, section.holdout_fraction)
    for name, part in (("learn from", train), ("measure on", held_out)):
        if not part:
            raise DataError(
                f"constitutional.safety_data={section.safety_data} leaves no text to {name} with "
                f"constitutional.holdout_fraction={section.holdout_fraction:g}; give more texts."
            )
    return SafetyTexts(train, held_out, bad)


def _built_in() -> list[LabelledText]:
    source = yaml.safe_load(resources.files(__package__).joinpath(BUILT_IN).read_text(encoding="utf-8"))
    topics: list[tuple[str, tuple[str, ...]]] = [(topic, ()) for topic in source["harmless"]]
    topics += [(topic, (name,)) for name, harmful in source["harmful"].items() for topic in harmful]
    return [
        LabelledText(frame.format(topic), categories, topic)
        for topic, categories in topics
        for frame in source["frames"]
    ]


def _read(path: Path) -> tuple[list[LabelledText], list[BadRow]]:
    # Imported here because pandas and pandera take seconds, which a run without a file of its own does not wait for.
    import pandas as pd  # noqa: PLC0415

    from ultrathink_model.data.schema import broken_rules, labelled_schema  # noqa: PLC0415

    items = list(read_json_lines(path, path.name))
    bad = [item for item in items if isinstance(item, BadRow)]
    rows = [item for item in items if not isinstance(item, BadRow)]
    values = {name: pd.Series([row.get(name) for _, row in rows], dtype=object) for name in ("text", "labels")}
    broken = broken_rules(labelled_schema(HARM_CATEGORIES), pd.DataFrame(values))
    bad += [
        BadRow(path.name, rows[place][0], rule, make_excerpt(rows[place][1])) for place, rule in sorted(broken.items())
    ]
    kept: list[dict[str, Any]] = [row for place, (_, row) in enumerate(rows) if place not in broken]
    return [LabelledText(row["text"], tuple(row["labels"]), row["text"]) for row in kept], bad


def _split(texts: Sequence[LabelledText], fraction: float) -> tuple[list[LabelledText], list[LabelledText]]:
    """Within each combination of categories, the topics of the lowest hashes are held out."""
    topics: dict[tuple[str, ...], set[str]] = {}
    for text in texts:
        topics.setdefault(text.categories, set()).add(text.topic)
    held = set()
    for categories, names in topics.items():
        ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
        held |= {(categories, name) for name in ranked[: round(fraction * len(ranked))]}
    inside = [(text.categories, text.topic) in held for text in texts]
    train = [text for text, is_held in zip(texts, inside, strict=True) if not is_held]
    return train, [text for text, is_held in zip(texts, inside, strict=True) if is_held]


class SafetyRows:
    """Labelled texts end to end in rows of the model's length; each pass over them takes the rows in another order.

    Args:
        texts: The texts.
        tokenizer: The run's.
        length: Tokens of a row.
        seed: Decides the order.
    """

    def __init__(self, texts: Sequence[LabelledText], tokenizer: Tokenizer, length: int, seed: int) -> None:
        order = permute(np.arange(len(texts), dtype=np.uint64), len(texts), mix(seed, SAFETY_ORDER))
        shuffled = [texts[int(index)] for index in order]
        encoded = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch([text.text for text in shuffled])]
        tokens = np.array([token for ids in encoded for token in ids], dtype=np.int64)
        bits = np.array([text.bits for text, ids in zip(shuffled, encoded, strict=True) for _ in ids], dtype=np.int64)
        begins = np.array([place == 0 for ids in encoded for place in range(len(ids))])
        # The last row is filled up from the beginning.
        places = (np.arange(-(-len(tokens) // length) * length) % len(tokens)).reshape(-1, length)
        documents = begins[places].cumsum(1)
        self._tokens, self._bits = torch.from_numpy(tokens[places]), torch.from_numpy(bits[places])
        self._documents = torch.from_numpy(documents - documents[:, :1])
        self._seed = seed

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, batch: Batch, numbers: Sequence[int]) -> Batch:
        """The batch with labelled rows of these numbers, counted over all passes, below its own."""
        if not numbers:
            return batch
        index = torch.tensor([self._place(number) for number in numbers])
        tokens, groups = self._tokens[index], batch.source_groups
        documents = torch.zeros_like(batch.input_ids) if batch.document_ids is None else batch.document_ids
        return replace(
            batch,
            input_ids=torch.cat([batch.input_ids, tokens]),
            labels=torch.cat([batch.labels, torch.full_like(tokens, IGNORED)]),
            document_ids=torch.cat([documents, self._documents[index].to(documents.dtype)]),
            source_groups=None if groups is None else torch.cat([groups, torch.full_like(tokens, NO_GROUP)]),
            harm_labels=self._bits[index],
            media=None if batch.media is None else batch.media.followed_by_rows(len(tokens)),
        )

    def _place(self, number: int) -> int:
        epoch, position = divmod(number, len(self))
        key = mix(self._seed, SAFETY_ORDER, epoch)
        return int(permute(np.array([position], dtype=np.uint64), len(self), key)[0])


def with_safety_rows(
    steps: Iterator[list[Batch]], manifest: DataManifest, config: Config, rank: int, world_size: int, first_step: int
) -> Iterator[list[Batch]]:
    """The micro-batches of each step, every so many of them with labelled rows, where the model has a harm head.

    Which micro-batch gets which rows depends on its number alone, so that a resumed run sees the same ones, and all
    ranks take part in the same micro-batches.

    Args:
        steps: This rank's micro-batches of each step; from `TrainLoader`.
        manifest: The prepared data that they come from.
        config: `constitutional.harm_token_fraction` says how many labelled rows there are.
        rank: This rank.
        world_size: Ranks.
        first_step: The step that `steps` begins with.

    Raises:
        DataError: The labelled texts cannot be used.
    """
    if not config.advanced.enable_constitutional:
        return steps
    texts = load_safety_texts(config)
    for row in texts.quarantined:
        logger.warning("constitutional.safety_data: a row is left out: %s", row.as_dict())
    logger.info("harm head: %d labelled texts to learn from, %d held out", len(texts.train), len(texts.held_out))
    tokenizer = Tokenizer.load(manifest.tokenizer_folder)
    rows = SafetyRows(texts.train, tokenizer, config.model.max_seq_length, config.training.seed)
    share = config.constitutional.harm_token_fraction * config.training.batch_size

    def extended(batch: Batch, number: int) -> Batch:
        due = range(int(number * share), int((number + 1) * share))
        return rows.extend(batch, [row * world_size + rank for row in due])

    return (
        [extended(batch, step * len(batches) + number) for number, batch in enumerate(batches)]
        for step, batches in enumerate(steps, start=first_step)
    )
