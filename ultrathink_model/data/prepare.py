"""Preparation: from the sources of a config to a folder of token shards, named by a hash of what it was made from."""

import hashlib
import importlib
import json
import logging
from pathlib import Path
from types import ModuleType

from filelock import FileLock

from ultrathink_model.config import Config
from ultrathink_model.data.manifest import FORMAT_VERSION, MANIFEST_NAME, DataManifest, load_manifest, media_settings
from ultrathink_model.data.mixture import list_sources
from ultrathink_model.data.sources import Ingredient, open_source
from ultrathink_model.data.tokenizer import check_fits
from ultrathink_model.data.tokenizer_choice import tokenizer_identity
from ultrathink_model.errors import DataError, DependencyError

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
        ConfigError: The mixture cannot be read, or a language to keep is not known.
        DependencyError: Cleaning is asked for, and its packages or its executor are not there.
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
                    # Imported here because pandera takes seconds, which a run whose data lies prepared does not wait for.
                    from ultrathink_model.data.build import build_folder  # noqa: PLC0415

                    build_folder(config, ingredients, fingerprint, folder)
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


def _load_cleaning() -> ModuleType:
    """The package that cleans, whose dependencies are optional.

    Raises:
        DependencyError: They are not installed.
    """
    try:
        return importlib.import_module("ultrathink_model.data.cleaning.clean")
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"the section `cleaning` asks for cleaning, which needs the package {error.name}: pip install "
            "'ultrathink-model[cleaning]', or switch its parts off."
        ) from None


def _gather(config: Config) -> list[Ingredient]:
    specs = list_sources(config.data)
    sources = [open_source(spec.dataset, config.data, config.advanced.enable_multimodal) for spec in specs]
    return [Ingredient(spec, source, source.identity()) for spec, source in zip(specs, sources, strict=True)]


def _fingerprint(config: Config, ingredients: list[Ingredient]) -> str:
    """A name for what is prepared: equal for equal content, rules and tokenizer, wherever the files lie."""
    parts = {
        "format": FORMAT_VERSION,
        "sources": [
            {"weight": ingredient.spec.weight, "cap": ingredient.spec.cap, "expert_group": ingredient.spec.expert_group}
            | ingredient.identity
            for ingredient in ingredients
        ],
        "tokenizer": tokenizer_identity(config),
        "sequence_length": config.model.max_seq_length,
        "validation_every": config.data.validation_every,
        "max_quarantine_fraction": config.data.max_quarantine_fraction,
        "packing": config.data.packing,
    }
    if config.advanced.enable_multimodal:
        parts["media"] = media_settings(config.multimodal)
    if config.cleaning.enabled:
        parts["cleaning"] = _load_cleaning().cleaning_identity(config)
    if any(ingredient.source.streaming for ingredient in ingredients):
        # A stream is read only as far as the epoch needs it.
        parts["train_samples"] = config.data.train_samples
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
