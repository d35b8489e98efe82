"""Reading a config: the YAML file, the overrides, and errors that name the nearest valid key."""

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ultrathink_model.config.root import Config
from ultrathink_model.config.yaml_text import read_yaml
from ultrathink_model.errors import ConfigError


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file, applies `a.b=c` overrides and validates the result.

    Args:
        path: The YAML file.
        overrides: Each `section.key=value`; the value is read as YAML, so lists, null and numbers keep their types.

    Raises:
        ConfigError: The file is missing or is not YAML; a key is unknown; a value breaks a rule.
    """
    return make_config(_read_yaml(Path(path)), overrides, origin=str(path))


def make_config(values: Mapping[str, Any], overrides: Iterable[str] = (), origin: str = "config") -> Config:
    """Validates nested values with `a.b=c` overrides on top; `origin` is named in the errors."""
    merged = {section: dict(keys) if isinstance(keys, Mapping) else keys for section, keys in values.items()}
    for override in overrides:
        _apply_override(merged, override)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error, origin)) from None


def override_config(config: Config, overrides: Iterable[str]) -> Config:
    """A copy of `config` with `a.b=c` overrides on top, validated anew."""
    return make_config(config.model_dump(), overrides)


def save_config(config: Config, path: str | Path) -> None:
    """Writes the resolved config as YAML that `load_config` reads back to the same config."""
    Path(path).write_text(dump_config(config), encoding="utf-8")


def dump_config(config: Config) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_hash(config: Config) -> str:
    """SHA-256 of the resolved config."""
    return hashlib.sha256(dump_config(config).encode()).hexdigest()


def valid_keys() -> list[str]:
    """Every `section.key` of the config."""
    return [
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for key in field.annotation.model_fields
    ]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}. Shipped configs lie in configs/train_*.yaml.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not a YAML file in UTF-8: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} holds {type(values).__name__}, not sections of keys such as `model:`.")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (separator and dot and section and key):
        raise ConfigError(f"--override {override!r} is not of the form section.key=value, as in training.batch_size=4.")
    if "." in key:
        raise ConfigError(
            f"--override {name} goes deeper than section.key; give the whole value of {section}.{key.split('.')[0]}."
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--override {override!r}: the value is not YAML: {' '.join(str(error).split())}") from None
    keys = values.setdefault(section, {})
    if not isinstance(keys, dict):
        keys = values[section] = {}
    keys[key] = value


def _explain(error: ValidationError, origin: str) -> str:
    return "\n".join(f"{origin}: {_explain_one(detail)}" for detail in error.errors(include_url=False))


def _explain_one(detail: ErrorDetails) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown key {name}.{_did_you_mean(name)}"
    if detail["type"] == "value_error":
        rule = detail["msg"].removeprefix("Value error, ")
        return f"{name}: {rule}." if name else f"{rule}."
    return f"{name}={detail['input']!r} is refused: {detail['msg'][0].lower()}{detail['msg'][1:]}."


def _did_you_mean(name: str) -> str:
    """The nearest valid key, in the same section or, for a key in the wrong section, by its last part."""
    candidates = valid_keys() if "." in name else list(Config.model_fields)
    same_key = [key for key in candidates if key.rpartition(".")[2] == name.rpartition(".")[2]]
    nearest = same_key or difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]}?" if nearest else f" Valid here: {', '.join(candidates[:12])}, …"
