"""Building a folder of prepared data: tokenizer, shards and manifest, put in place in one step."""

import itertools
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Literal

from ultrathink_model.config import Config
from ultrathink_model.data.intake import Intake
from ultrathink_model.data.manifest import DataManifest, add_up, save_manifest
from ultrathink_model.data.sources import Ingredient
from ultrathink_model.data.tokenize import SPLITS, write_source
from ultrathink_model.data.tokenizer import check_fits
from ultrathink_model.data.tokenizer_choice import choose_tokenizer
from ultrathink_model.errors import DataError

logger = logging.getLogger(__name__)


def build_folder(config: Config, ingredients: list[Ingredient], fingerprint: str, folder: Path) -> None:
    """Builds the folder beside its place and renames it there; leftovers of a killed preparation go first.

    Raises:
        DataError: A source cannot be read, is empty, has too many bad rows, or changed while it was read.
        TokenizerError: The tokenizer cannot be had or is larger than `model.vocab_size`.
    """
    for leftover in folder.parent.glob(f".{fingerprint}.part*"):
        shutil.rmtree(leftover)
    # A folder without its manifest was not written by a preparation: the rename below needs the place free.
    if folder.exists():
        shutil.rmtree(folder)
    part = folder.parent / f".{fingerprint}.part{os.getpid()}"
    part.mkdir()
    try:
        _fill_folder(config, ingredients, fingerprint, part)
        for ingredient in ingredients:
            if ingredient.source.identity() != ingredient.identity:
                raise DataError(f"data.dataset={ingredient.source.name} changed while it was read; start again.")
        _sync_tree(part)
        part.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fill_folder(config: Config, ingredients: list[Ingredient], fingerprint: str, part: Path) -> None:
    started = time.monotonic()
    intakes = [Intake(ingredient.source, config.data) for ingredient in ingredients]
    tokenizer = choose_tokenizer(config, intakes)
    check_fits(tokenizer.vocab_size, config.model.vocab_size, config.data.tokenizer_name)
    tokenizer.save(part / "tokenizer")
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    infos = [
        write_source(config, ingredient, tokenizer, part, f"{number:02d}", dtype)
        for number, ingredient in enumerate(ingredients)
    ]
    manifest = DataManifest(
        path=part,
        fingerprint=fingerprint,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        sequence_length=config.model.max_seq_length,
        token_dtype=dtype,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        splits={split: add_up(info.splits[split] for info in infos) for split in SPLITS},
        sources=infos,
        quarantined=sum(info.quarantined for info in infos),
    )
    save_manifest(manifest, part)
    size = sum(split.bytes for split in manifest.splits.values()) / 1e6
    seconds = time.monotonic() - started
    logger.info("prepared %.1f MB of text in %.1f s (%.1f MB/s)", size, seconds, size / seconds)


def _sync_tree(folder: Path) -> None:
    """Forces a folder's names and its files' bytes to the disk, so that the rename never comes before them."""
    for path in itertools.chain(folder.rglob("*"), [folder]):
        _sync(path)


def _sync(path: Path) -> None:
    # Windows opens no folders, and keeps their names without being asked.
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
