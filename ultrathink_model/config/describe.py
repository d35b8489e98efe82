"""The config described in words: every key with its type, default and meaning, read from the models.

`python -m ultrathink_model.config.describe` prints `docs/configuration.md`; `--help` prints the same as plain text.
"""

import textwrap
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ultrathink_model.config.root import Config

BOUND_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
PLAIN_NAMES = {int: "int", float: "float", bool: "bool", str: "str"}

INTRODUCTION = """\
# Configuration

Every key of the config, made from the models in `ultrathink_model/config/` by
`python -m ultrathink_model.config.describe > docs/configuration.md`; edit the models, not this page.

A config is a YAML file of sections. `--override section.key=value` changes a value for one run: the value is read as
YAML, so `null`, `true`, `[1, 2]` and numbers keep their types. A key that is left out takes the default below; a key
that does not exist is refused, with the nearest one that does.
"""


class Key(NamedTuple):
    """One key of the config, in words."""

    section: str
    name: str
    type: str
    default: str
    description: str

    @property
    def path(self) -> str:
        """The key as `--override` takes it."""
        return f"{self.section}.{self.name}"


class SectionText(NamedTuple):
    """One section of the config, in words."""

    name: str
    description: str
    keys: list[Key]


def describe_config() -> list[SectionText]:
    """Every section and key of the config, in the order of the YAML."""
    return [
        SectionText(name, _summary(section), [_describe_key(name, key, info) for key, info in _fields(section)])
        for name, section in _sections()
    ]


def render_markdown() -> str:
    """The page `docs/configuration.md`."""
    parts = [INTRODUCTION]
    for section in describe_config():
        parts += [f"## `{section.name}`", "", section.description, "", "| key | type | default | meaning |"]
        parts += ["|---|---|---|---|"]
        parts += [
            f"| `{key.name}` | {_cell(key.type)} | `{key.default}` | {_cell(key.description)} |" for key in section.keys
        ]
        parts += [""]
        for model in _nested_models(section.name):
            parts += [f"An entry of the list: {_summary(model)}", "", "| key | type | default | meaning |"]
            parts += ["|---|---|---|---|"]
            keys = [_describe_key(section.name, key, info) for key, info in _fields(model)]
            parts += [
                f"| `{key.name}` | {_cell(key.type)} | `{key.default}` | {_cell(key.description)} |" for key in keys
            ]
            parts += [""]
    return "\n".join(parts)


def render_text(width: int = 100) -> str:
    """Every key as plain text for `--help`."""
    lines = ["config keys (--override section.key=value):"]
    for section in describe_config():
        lines += ["", f"  {section.name}: {section.description}"]
        for key in section.keys:
            lines += [f"    {key.path}  ({key.type}; default {key.default})"]
            lines += textwrap.wrap(key.description, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, BaseModel)
        yield name, field.annotation


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    yield from model.model_fields.items()


def _nested_models(section: str) -> list[type[BaseModel]]:
    """Models that stand inside lists of a section."""
    fields = dict(_sections())[section].model_fields.values()
    return [part for field in fields for part in _leaves(field.annotation) if _is_model(part)]


def _leaves(annotation: Any) -> Iterator[Any]:
    arguments = () if get_origin(annotation) is Literal else get_args(annotation)
    if not arguments:
        yield annotation
    for argument in arguments:
        yield from _leaves(argument)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _summary(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _describe_key(section: str, name: str, info: FieldInfo) -> Key:
    assert info.description, f"{section}.{name} has no description"
    default = "required" if info.is_required() else _value(info.get_default())
    return Key(section, name, _type_name(info.annotation) + _bounds(info), default, info.description)


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(_value(argument) for argument in arguments)
    if origin in (Union, UnionType):
        return " | ".join("null" if argument is NoneType else _type_name(argument) for argument in arguments)
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"map of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    return PLAIN_NAMES.get(annotation, annotation.__name__)


def _bounds(info: FieldInfo) -> str:
    """The numeric bounds of a field, as in `, ≥ 0, < 1`."""
    limits = ((sign, getattr(rule, name, None)) for rule in info.metadata for name, sign in BOUND_SIGNS.items())
    return "".join(f", {sign} {limit:g}" for sign, limit in limits if limit is not None)


def _value(value: Any) -> str:
    """A value as the YAML of a config spells it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _cell(text: str) -> str:
    """Text of a table cell: a bar would end it."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(render_markdown(), end="")
