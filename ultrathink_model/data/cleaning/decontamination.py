"""The n-grams of evaluation sets, which training documents must not share."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from datatrove.pipeline.decont import NGramsDecontConfig
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.text import ngrams, simplify_text

from ultrathink_model.data.cleaning.words import WORDS
from ultrathink_model.data.compression import format_suffix
from ultrathink_model.data.document import BadRow
from ultrathink_model.data.file_formats import READERS, read_csv_records, read_jsonl
from ultrathink_model.data.json_lines import read_json_lines
from ultrathink_model.data.local import LocalFile, find_files
from ultrathink_model.errors import DataError

logger = logging.getLogger(__name__)


def write_index(name: str, texts: Iterable[str], length: int, folder: Path) -> None:
    """Writes the hashes of all n-grams of an evaluation set, as datatrove's filter reads them.

    datatrove's own indexer needs lighteval and its tasks; this one takes any text.
    """
    config = NGramsDecontConfig(n_grams=length)
    hash_words = create_hash_func(config.hash_config)
    hashes: set[int] = set()
    count = short = 0
    for text in texts:
        words = WORDS.word_tokenize(simplify_text(text, config.norm_config))
        hashes.update(hash_words(" ".join(words)) for words in ngrams(words, length))
        count, short = count + 1, short + (len(words) < length)
    if short:
        logger.warning(
            "cleaning.decontaminate: %d of %d texts of %s have fewer words than cleaning.decontaminate_ngram=%d, and are "
            "not looked for",
            short,
            count,
            name,
            length,
        )
    folder.mkdir(parents=True, exist_ok=True)
    np.array(sorted(hashes), dtype=config.hash_config.np_descr).tofile(folder / f"{name}.index.hashes")


def read_evaluation_set(name: str) -> Iterator[str]:
    """Every string in the rows of an evaluation set, and every text file as one; its columns need not be named.

    Raises:
        DataError: There is no such file, or a row of it cannot be read.
    """
    for file in find_files(name):
        for item in _read(file):
            if isinstance(item, BadRow):
                raise DataError(
                    f"cleaning.decontaminate={name}: {item.file} row {item.row} breaks the rule: {item.rule}."
                )
            yield from _strings(item)


def _read(file: LocalFile) -> Iterator[object]:
    reader = READERS[format_suffix(file.path)]
    if reader is read_jsonl:
        yield from (item if isinstance(item, BadRow) else item[1] for item in read_json_lines(file.path, file.name))
    elif format_suffix(file.path) == ".csv":
        yield from (record for _, record in read_csv_records(file.path, file.name, ()))
    else:
        for row in reader(file.path, file.name, "text", False):
            yield row if isinstance(row, BadRow) else row.text


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
