"""Building a folder of prepared data: tokenizer, shards and manifest, put in place in one step."""

import itertools
import logging
import os
import shutil
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from ultrathink_model import __version__
from ultrathink_model.config import Config
from ultrathink_model.data.card import Sample, write_card
from ultrathink_model.data.hub import HubSource
from ultrathink_model.data.intake import SPLITS, Intake
from ultrathink_model.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    MEDIA_FOLDER,
    CleaningPart,
    DataManifest,
    MediaInfo,
    add_up,
    media_settings,
    save_manifest,
)
from ultrathink_model.data.media_store import MediaWriter
from ultrathink_model.data.sources import Ingredient
from ultrathink_model.data.tokenize import write_record, write_source
from ultrathink_model.data.tokenizer import Tokenizer, check_fits
from ultrathink_model.data.tokenizer_choice import choose_tokenizer
from ultrathink_model.errors import DataError, SourceLostError

QUARANTINE_NAME = "quarantine.jsonl"
TOKENIZER_FOLDER = "tokenizer"
BUILD_NAME = "build.json"
# Of what a half-built folder holds beside the data.
RECORDS_VERSION = 3

logger = logging.getLogger(__name__)


def build_folder(config: Config, ingredients: list[Ingredient], fingerprint: str, folder: Path) -> None:
    """Builds the folder beside its place and renames it there; what a killed preparation left is gone on with.

    Raises:
        DataError: A source cannot be read, is empty, has too many bad rows, or changed while it was read.
        TokenizerError: The tokenizer cannot be had or is larger than `model.vocab_size`.
    """
    # A folder without its manifest was not written by a preparation: the rename below needs the place free.
    if folder.exists():
        shutil.rmtree(folder)
    part = folder.parent / f".{fingerprint}.part"
    is_filled = (part / MANIFEST_NAME).is_file()
    if not is_filled:
        _begin(part, ingredients)
    try:
        if not is_filled:
            _fill_folder(config, ingredients, fingerprint, part)
        _require_unchanged(ingredients)
        _remove_records(part)
        _sync_tree(part)
        part.rename(folder)
        _sync(folder.parent)
    except (SourceLostError, OSError):
        raise
    except Exception:
        # What failed would fail again; only what was cut short is worth going on with.
        shutil.rmtree(part, ignore_errors=True)
        raise


def _require_unchanged(ingredients: list[Ingredient]) -> None:
    for ingredient in ingredients:
        if ingredient.source.identity() != ingredient.identity:
            raise DataError(f"data.dataset={ingredient.source.name} changed while it was read; start again.")


class _Begun(BaseModel):
    """What a half-built folder is made by, and from which commits of the hub, by the hub's id."""

    made_by: str
    revisions: dict[str, str]


def _begin(part: Path, ingredients: list[Ingredient]) -> None:
    """Takes up a half-built folder of this same version and of the same revisions of the hub, or begins a new one.

    Raises:
        SourceLostError: It holds a part of a dataset whose hub does not answer.
    """
    sources = [part.source for part in ingredients if isinstance(part.source, HubSource)]
    revisions = {source.hub_id: source.revision for source in sources if source.revision}
    record = part / BUILD_NAME
    try:
        found = _Begun.model_validate_json(record.read_bytes()) if record.is_file() else None
    except ValidationError:
        found = None
    lost = [source.name for source in sources if found and source.hub_id in found.revisions.keys() - revisions.keys()]
    if lost:
        # The cache, which would stand in, does not tell revisions apart.
        raise SourceLostError(
            f"{part} holds a part of data.dataset={', '.join(lost)}, and the hub does not answer; start again with a "
            "network, which goes on from there, or remove the folder."
        )
    made_by = f"{FORMAT_VERSION} {RECORDS_VERSION} {__version__}"
    if any(source.streaming for source in sources):
        # The states of streams are those of the library.
        made_by += f" datasets-{version('datasets')}"
    begun = _Begun(made_by=made_by, revisions=revisions)
    if found == begun:
        logger.info("going on with the preparation in %s, which was cut short", part)
        return
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    write_record(record, begun)


def _fill_folder(config: Config, ingredients: list[Ingredient], fingerprint: str, part: Path) -> None:
    started = time.monotonic()
    parts: list[CleaningPart] = []
    if config.cleaning.enabled:
        # Imported here because its packages are optional, and take their time.
        from ultrathink_model.data.cleaning.clean import clean  # noqa: PLC0415

        ingredients, parts, extracted = clean(config, ingredients, part)
    with (
        MediaWriter(part / MEDIA_FOLDER, config.multimodal)
        if config.advanced.enable_multimodal
        else nullcontext() as media
    ):
        manifest, samples = _write_sources(config, ingredients, fingerprint, part, media)
    if parts:
        # Bad rows were left out before cleaning, and what it left was read again.
        sources = [
            info.model_copy(update={"rows": source.rows, "quarantined": source.quarantined + info.quarantined})
            for info, source in zip(manifest.sources, extracted, strict=True)
        ]
        quarantined = sum(info.quarantined for info in sources)
        manifest = manifest.model_copy(update={"sources": sources, "quarantined": quarantined, "cleaning": parts})
    _collect_quarantine(manifest, part)
    write_card(manifest, samples, part)
    save_manifest(manifest, part)
    size = sum(split.bytes for split in manifest.splits.values()) / 1e6
    seconds = time.monotonic() - started
    logger.info("prepared %.1f MB of text in %.1f s (%.1f MB/s)", size, seconds, size / seconds)


def _write_sources(
    config: Config, ingredients: list[Ingredient], fingerprint: str, part: Path, media: MediaWriter | None
) -> tuple[DataManifest, list[Sample]]:
    """Writes the tokenizer, the shards and the media store, and says what they are; with samples of each source."""
    tokenizer = _settle_tokenizer(config, ingredients, part, media)
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    written = [
        write_source(config, ingredient, tokenizer, part, f"{number:02d}", dtype, media)
        for number, ingredient in enumerate(ingredients)
    ]
    infos = [source.info for source in written]
    manifest = DataManifest(
        path=part,
        fingerprint=fingerprint,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        sequence_length=config.model.max_seq_length,
        packing=config.data.packing,
        token_dtype=dtype,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        splits={split: add_up(info.splits[split] for info in infos) for split in SPLITS},
        sources=infos,
        quarantined=sum(info.quarantined for info in infos),
        cleaning=[],
        media=None if media is None else _describe_media(media, config, tokenizer),
    )
    return manifest, [sample for source in written for sample in source.samples]


def _describe_media(media: MediaWriter, config: Config, tokenizer: Tokenizer) -> MediaInfo:
    """What the media store holds, and how it was made."""
    images, sounds = media.counts
    logger.info("the media store holds %d images and %d sounds", images, sounds)
    return MediaInfo(
        **media_settings(config.multimodal),
        token_ids=tokenizer.media_ids,
        images=images,
        sounds=sounds,
        sound_bytes=media.sound_bytes,
    )


def _settle_tokenizer(
    config: Config, ingredients: list[Ingredient], part: Path, media: MediaWriter | None
) -> Tokenizer:
    """The tokenizer in `part/tokenizer`, which a killed preparation may have put there."""
    folder = part / TOKENIZER_FOLDER
    if not folder.is_dir():
        tokenizer = choose_tokenizer(
            config, [Intake(ingredient.source, config.data, media=media) for ingredient in ingredients]
        )
        check_fits(tokenizer.vocab_size, config.model.vocab_size, config.data.tokenizer_name)
        unfinished = part / f".{TOKENIZER_FOLDER}"
        tokenizer.save(unfinished)
        if media is not None:
            # The next start numbers them in this order.
            media.sync()
        unfinished.rename(folder)
    return Tokenizer.load(folder)


def _collect_quarantine(manifest: DataManifest, part: Path) -> None:
    """Joins the bad rows of cleaning and of the sources in `quarantine.jsonl`."""
    if not manifest.quarantined:
        return
    with (part / QUARANTINE_NAME).open("w", encoding="utf-8") as target:
        for file in sorted(part.glob("quarantine_*.jsonl")):
            target.write(file.read_text(encoding="utf-8"))
    logger.warning("%d rows are in %s", manifest.quarantined, QUARANTINE_NAME)


def _remove_records(part: Path) -> None:
    """Removes what a preparation that is cut short goes on from, once the manifest says that there is no more to do."""
    shutil.rmtree(part / "cleaning", ignore_errors=True)
    for pattern in ("progress_*", "hashes_*", "source_*", "quarantine_*", BUILD_NAME):
        for path in part.glob(pattern):
            path.unlink()


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
