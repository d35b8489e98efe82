"""The manifest: what a prepared data set holds, as JSON beside its shards."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ultrathink_model.config.data import ExpertGroup, Packing
from ultrathink_model.config.multimodal import MultimodalConfig
from ultrathink_model.data.document import Split
from ultrathink_model.errors import DataError
from ultrathink_model.media.placeholders import Kind

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION: Literal[2] = 2
MEDIA_FOLDER = "media"
DIGEST_BYTES = 32
INDEX_NAME = "media.bin"
INDEX_ENTRY_BYTES = 32


class SplitInfo(BaseModel):
    """The size of one split.

    `tokens` counts the tokens that a pass over the split predicts, each once: every token of every document and the
    end-of-text token after it. `bytes` counts the UTF-8 bytes of the documents' text, without any mark between them.
    The loss of a whole pass in nats, divided by `bytes` and ln 2, is therefore bits per byte. `padding` counts the places
    of its sequences that hold no token. `images` and `sounds` count every use of one, and `media_tokens` the places that
    these take: tokens that are seen and not predicted, so that `tokens` leaves them out, and `bytes` their placeholders.
    """

    model_config = ConfigDict(frozen=True)

    documents: int
    tokens: int
    bytes: int
    sequences: int
    padding: int
    images: int = 0
    sounds: int = 0
    media_tokens: int = 0

    @property
    def stream_tokens(self) -> int:
        """All tokens of the stream, those of images and sounds too."""
        return self.tokens + self.media_tokens

    @property
    def padding_share(self) -> float:
        """Share of the sequences' places that hold no token."""
        return self.padding / max(self.padding + self.stream_tokens, 1)


def add_up(infos: Iterable[SplitInfo]) -> SplitInfo:
    """The sizes of several sources' splits together."""
    every = list(infos)
    return SplitInfo(
        documents=sum(info.documents for info in every),
        tokens=sum(info.tokens for info in every),
        bytes=sum(info.bytes for info in every),
        sequences=sum(info.sequences for info in every),
        padding=sum(info.padding for info in every),
        images=sum(info.images for info in every),
        sounds=sum(info.sounds for info in every),
        media_tokens=sum(info.media_tokens for info in every),
    )


class ShardInfo(BaseModel):
    """One file of tokens and the file of its documents' ends, named within the manifest's folder."""

    model_config = ConfigDict(frozen=True)

    tokens_file: str
    documents_file: str
    tokens: int
    documents: int


class SourceInfo(BaseModel):
    """One source: what it was made from, and what each split holds of it."""

    model_config = ConfigDict(frozen=True)

    name: str
    licence: str
    weight: float
    cap: int | None
    expert_group: ExpertGroup | None
    identity: dict[str, object]
    rows: int
    quarantined: int
    duplicates: int
    """Documents that equal an earlier one of the source and are still in it."""
    splits: dict[Split, SplitInfo]
    shards: dict[Split, list[ShardInfo]]


class CleaningPart(BaseModel):
    """What one part of cleaning did: the documents that it saw, those that it removed, and whatever else it counts."""

    model_config = ConfigDict(frozen=True)

    name: str
    documents: int
    removed: int
    counts: dict[str, int]


class MediaInfo(BaseModel):
    """How images and sounds were preprocessed, the ids of their tokens, and how many different ones are stored.

    `sound_bytes` is the size of all sounds together; an image's follows from `image_size`.
    """

    model_config = ConfigDict(frozen=True)

    image_size: int
    patch_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    audio_sample_rate: int
    mel_bins: int
    audio_stack: int
    max_audio_seconds: float
    token_ids: dict[Kind, int]
    images: int
    sounds: int
    sound_bytes: int

    def file_sizes(self) -> dict[str, int]:
        """The bytes of each file of the media store, named within the manifest's folder."""
        sizes: dict[str, int] = {}
        for name, count, size in (
            ("images", self.images, 3 * self.images * self.image_size**2),
            ("audio", self.sounds, self.sound_bytes),
        ):
            stem = f"{MEDIA_FOLDER}/{name}"
            sizes |= {f"{stem}.bin": size, f"{stem}.ends": 8 * count, f"{stem}.sha256": DIGEST_BYTES * count}
        return sizes


MEDIA_KEYS = (
    "image_size",
    "patch_size",
    "image_mean",
    "image_std",
    "audio_sample_rate",
    "mel_bins",
    "audio_stack",
    "max_audio_seconds",
)


def media_settings(config: MultimodalConfig) -> dict[str, Any]:
    """The keys of the section `multimodal` that preprocessed media and their tokens follow from."""
    return {key: getattr(config, key) for key in MEDIA_KEYS}


class DataManifest(BaseModel):
    """A prepared data set: its folder, its fingerprint, and the size of its splits."""

    model_config = ConfigDict(frozen=True)

    format_version: Literal[2] = FORMAT_VERSION
    path: Path
    fingerprint: str
    tokenizer_hash: str
    vocab_size: int
    sequence_length: int
    packing: Packing
    token_dtype: Literal["uint16", "uint32"]
    eos_id: int
    pad_id: int
    splits: dict[Split, SplitInfo]
    sources: list[SourceInfo]
    quarantined: int
    cleaning: list[CleaningPart]
    media: MediaInfo | None = None
    """None for data that were prepared without `advanced.enable_multimodal`."""

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer's files."""
        return self.path / "tokenizer"


def save_manifest(manifest: DataManifest, folder: Path) -> None:
    """Writes `manifest.json` into `folder`, in one step; the folder's own path is left out, so that it can be moved."""
    part = folder / f"{MANIFEST_NAME}.part"
    part.write_text(manifest.model_dump_json(indent=2, exclude={"path"}) + "\n", encoding="utf-8")
    part.replace(folder / MANIFEST_NAME)


def load_manifest(folder: str | Path) -> DataManifest:
    """Reads the manifest of a prepared folder and checks that its shards and its media are there, whole.

    Raises:
        DataError: The folder is not prepared data of this version, or a shard is missing or has another size.
    """
    folder = Path(folder).resolve()
    remedy = f"delete {folder} and start again: it is prepared anew"
    try:
        values = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        manifest = DataManifest.model_validate(values | {"path": folder})
    except OSError as error:
        raise DataError(f"{folder} holds no prepared data ({MANIFEST_NAME}: {error.strerror})") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST_NAME} is not a manifest of this version ({error}); {remedy}") from None
    width = 2 if manifest.token_dtype == "uint16" else 4
    for source in manifest.sources:
        for shard in itertools.chain.from_iterable(source.shards.values()):
            file = folder / shard.tokens_file
            size = file.stat().st_size if file.is_file() else -1
            if size != shard.tokens * width or not (folder / shard.documents_file).is_file():
                raise DataError(f"{file} should hold {shard.tokens * width} bytes and holds {max(size, 0)}; {remedy}")
    for name, size in _media_files(manifest).items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            raise DataError(f"{folder / name} should hold {size} bytes and holds {found}; {remedy}")
    return manifest


def _media_files(manifest: DataManifest) -> dict[str, int]:
    """The bytes of each file of media; none for data without."""
    if manifest.media is None:
        return {}
    sizes = manifest.media.file_sizes()
    for source in manifest.sources:
        for split, info in source.splits.items():
            index = Path(source.shards[split][0].tokens_file).parent / INDEX_NAME
            sizes[index.as_posix()] = INDEX_ENTRY_BYTES * (info.images + info.sounds)
    return sizes
