"""Preparation: from the sources of a config to a folder of token shards, named by a hash of what it was made from."""

import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Literal

from filelock import FileLock

from ultrathink_model.config import Config
from ultrathink_model.data.intake import Intake
from ultrathink_model.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    DataManifest,
    add_up,
    load_manifest,
    save_manifest,
)
from ultrathink_model.data.mixture import list_sources
from ultrathink_model.data.sources import open_source
from ultrathink_model.data.tokenize import SPLITS, Ingredient, write_source
from ultrathink_model.data.tokenizer import check_fits
from ultrathink_model.data.tokenizer_choice import choose_tokenizer, tokenizer_identity
from ultrathink_model.errors import DataError

logger = logging.getLogger(__name__)


def prepare_data(config: Config) -> DataManifest:
    """Tokenizes the config's sources into `data.cache_dir/<fingerprint>/`, or finds them there.

    The fingerprint covers what the shards follow from: the sources' content, the tokenizer, the sequence length and the
    rules of splitting and quarantine. The folder appears in one step when it is whole; processes that prepare the same
    data at once wait for the first of them.

    Raises:
        DataError: A source is missing, empty or unreadable, too many of its rows break the schema, or the cache folder
            cannot be written.
        TokenizerError: The tokenizer cannot be had or is larger than `model.vocab_size`.
        ConfigError: The mixture cannot be read.
    """
    cache = Path(config.data.cache_dir)
    try:
        ingredients = _gather(config)
        fingerprint = _fingerprint(config, ingredients)
        folder = cache / fingerprint
        if not (folder / MANIFEST_NAME).is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f".{fingerprint}.lock"):
                if not (folder / MANIFEST_NAME).is_file():
                    _prepare_folder(config, ingredients, fingerprint, folder)
    except OSError as error:
        raise DataError(
            f"data.cache_dir={config.data.cache_dir} cannot be written ({error}); free space there, or set another folder."
        ) from None
    manifest = load_manifest(folder)
    check_fits(manifest.vocab_size, config.model.vocab_size, config.data.tokenizer_name)
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    logger.info(
        "data %s: %s training and %s validation tokens in %s",
        " + ".join(source.name for source in manifest.sources),
        f"{train.tokens:,}",
        f"{validation.tokens:,}",
        manifest.path,
    )
    return manifest


def _gather(config: Config) -> list[Ingredient]:
    specs = list_sources(config.data)
    sources = [open_source(spec.dataset, config.data) for spec in specs]
    return [Ingredient(spec, source, source.identity()) for spec, source in zip(specs, sources, strict=True)]


def _fingerprint(config: Config, ingredients: list[Ingredient]) -> str:
    """A name for what is prepared: equal for equal content, rules and tokenizer, wherever the files lie."""
    parts = {
        "format": FORMAT_VERSION,
        "sources": [
            {"weight": ingredient.spec.weight, "expert_group": ingredient.spec.expert_group} | ingredient.identity
            for ingredient in ingredients
        ],
        "tokenizer": tokenizer_identity(config),
        "sequence_length": config.model.max_seq_length,
        "validation_every": config.data.validation_every,
        "max_quarantine_fraction": config.data.max_quarantine_fraction,
    }
    if any(ingredient.source.streaming for ingredient in ingredients):
        # A stream is read only as far as the epoch needs it.
        parts["train_samples"] = config.data.train_samples
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _prepare_folder(config: Config, ingredients: list[Ingredient], fingerprint: str, folder: Path) -> None:
    """Builds the folder beside its place and renames it there; leftovers of a killed preparation go first."""
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
