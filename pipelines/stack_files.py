"""Stack files: read, filled in, checked before ZenML sees them, and applied as often as one likes."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
import zenml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from zenml.client import Client
from zenml.enums import StackComponentType
from zenml.models import ComponentResponse, StackResponse
from zenml.stack.flavor import Flavor
from zenml.utils.pagination_utils import depaginate

from ultrathink_model.config.yaml_text import read_yaml
from ultrathink_model.errors import ConfigError

STACK_PREFIX = "ultrathink_"
PLACEHOLDER = re.compile(r"<([a-z0-9-]+)>")
SECRET_NAME = re.compile(r"secret|password|passphrase|token|api_?key|access_key|private_key|credential", re.IGNORECASE)
# Values that name where a secret is: ZenML's store, as in {{name.key}}.
SECRET_REFERENCE = re.compile(r"\{\{.+\}\}")


class ComponentFile(BaseModel):
    """One component of a stack."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    flavor: str = Field(min_length=1)
    configuration: dict[str, Any] = {}


class StackFile(BaseModel):
    """A stack in the form that `zenml stack import` takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    zenml_version: str
    stack_name: str = Field(min_length=1)
    components: dict[StackComponentType, ComponentFile]


class Change(NamedTuple):
    """What applying a file does to one component, or to the stack.

    Attributes:
        action: `create`, `update` or `keep`.
        what: The component or stack.
        details: Each key that changes, with both values.
    """

    action: str
    what: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"{self.action:6} {self.what}", *(f"         {detail}" for detail in self.details)])


def read_stack_file(path: Path, values: Mapping[str, str] | None = None) -> StackFile:
    """Reads and checks a stack file.

    Args:
        path: The file.
        values: What stands for each `<name>` in it.

    Raises:
        ConfigError: It cannot be read, is not a stack of this ZenML, has a key that its component does not know, holds
            a secret, or keeps a `<name>` that no value is given for.
    """
    values = values or {}
    try:
        text = path.read_text(encoding="utf-8")
        content = read_yaml(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Shipped stacks lie in stack_configs/.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    names = set(PLACEHOLDER.findall(yaml.safe_dump(content)))
    unknown = sorted(values.keys() - names)
    if unknown:
        raise ConfigError(f"--values {unknown[0]}: {path} has no <{unknown[0]}>; it has {_list(names)}.")
    missing = sorted(names - values.keys())
    if missing:
        given = " ".join(f"{name}=…" for name in missing)
        raise ConfigError(f"{path} leaves {_list(missing)} open; say what they are: --values {given}")
    try:
        stack = StackFile.model_validate(_filled(content, values))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from None
    _check(path, stack)
    return stack


def apply_stack(stack: StackFile, *, dry_run: bool = False) -> list[Change]:
    """Makes ZenML have the stack as the file says, and says what that changed; again, it changes nothing.

    Args:
        stack: A checked file.
        dry_run: Only say it.

    Raises:
        ConfigError: A component of the name exists with another flavor.
    """
    client, changes, ids = Client(), [], {}
    for kind, wanted in stack.components.items():
        found = _find_component(client, kind, wanted)
        change, configuration = _compare(kind, wanted, found)
        changes.append(change)
        if dry_run:
            continue
        if found is None:
            found = client.create_stack_component(wanted.name, wanted.flavor, kind, wanted.configuration)
        elif change.action == "update":
            client.update_stack_component(found.id, kind, configuration=configuration)
        ids[kind] = found.id
    known = next((known for known in client.list_stacks(name=stack.stack_name).items), None)
    changes.append(_compare_stack(stack, known))
    if dry_run:
        return changes
    if known is None:
        client.create_stack(stack.stack_name, ids)
    elif changes[-1].action == "update":
        client.update_stack(known.id, component_updates={kind: [found] for kind, found in ids.items()})
    return changes


def find_stack(name: str) -> StackResponse:
    """The registered stack of a name, or of that name after `ultrathink_`.

    Raises:
        ConfigError: There is none.
    """
    client = Client()
    for full_name in (name, f"{STACK_PREFIX}{name}"):
        try:
            return client.get_stack(full_name, allow_name_prefix_match=False)
        except KeyError:
            continue
    names = ", ".join(stack.name for stack in depaginate(client.list_stacks))
    raise ConfigError(
        f"--stack {name} is not registered; there is {names}. "
        f"`python run.py stacks apply stack_configs/{name.removeprefix(STACK_PREFIX)}.yaml` registers a shipped one."
    )


def _find_component(client: Client, kind: StackComponentType, wanted: ComponentFile) -> ComponentResponse | None:
    found = next(iter(client.list_stack_components(name=wanted.name, type=kind, hydrate=True).items), None)
    if found is not None and found.flavor_name != wanted.flavor:
        raise ConfigError(
            f"the {kind.value} {wanted.name} exists with flavor {found.flavor_name}, and the file wants {wanted.flavor}; "
            f"name another, or delete that one: zenml {kind.value.replace('_', '-')} delete {wanted.name}"
        )
    return found


def _compare(
    kind: StackComponentType, wanted: ComponentFile, found: ComponentResponse | None
) -> tuple[Change, dict[str, Any]]:
    """The change of a component, and the configuration that makes it: None takes a key away."""
    what = f"{kind.value} {wanted.name} ({wanted.flavor})"
    if found is None:
        return Change("create", what), wanted.configuration
    flavor = _flavor(kind, wanted.flavor)
    new, old = (_normal(flavor, configuration) for configuration in (wanted.configuration, found.configuration))
    different = sorted(key for key in new.keys() | old.keys() if new.get(key) != old.get(key))
    details = tuple(f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in different)
    configuration = {key: wanted.configuration.get(key) for key in different}
    return Change("update" if details else "keep", what, details), configuration


def _compare_stack(stack: StackFile, known: StackResponse | None) -> Change:
    if known is None:
        return Change("create", f"stack {stack.stack_name}")
    old = {kind: components[0].name for kind, components in known.components.items() if components}
    new = {kind: component.name for kind, component in stack.components.items()}
    different = [kind for kind in new if old.get(kind) != new[kind]]
    details = tuple(f"{kind.value}: {old.get(kind)} -> {new[kind]}" for kind in different)
    return Change("update" if details else "keep", f"stack {stack.stack_name}", details)


def _normal(flavor: Flavor, configuration: dict[str, Any]) -> dict[str, Any]:
    """A configuration as its model reads it, so that what was left out equals the default."""
    return flavor.config_class(**configuration).model_dump(mode="json")


def _check(path: Path, stack: StackFile) -> None:
    if stack.zenml_version != zenml.__version__:
        raise ConfigError(
            f"{path}: zenml_version={stack.zenml_version} is not the ZenML here, {zenml.__version__}; "
            "look at its changes, and set it"
        )
    for kind, component in stack.components.items():
        place = f"{path}: components.{kind.value}"
        fields = _flavor(kind, component.flavor, place).config_class.model_fields
        for key, value in component.configuration.items():
            if key not in fields:
                raise ConfigError(
                    f"{place}.configuration.{key} is not known to {component.flavor}.{_hint(key, fields)}"
                )
            if SECRET_NAME.search(key) and isinstance(value, str) and not SECRET_REFERENCE.fullmatch(value):
                raise ConfigError(
                    f"{place}.configuration.{key} holds a secret; put it into ZenML's store and write "
                    "'{{name.key}}', or leave it to the environment"
                )
        try:
            _normal(_flavor(kind, component.flavor, place), component.configuration)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{place}.configuration.{where}={first['input']!r} is refused: {first['msg']}") from None


def _flavor(kind: StackComponentType, name: str, place: str = "") -> Flavor:
    known = {flavor.name: flavor for flavor in depaginate(Client().list_flavors, type=kind, hydrate=True)}
    if name not in known:
        raise ConfigError(f"{place}.flavor={name} does not exist.{_hint(name, known)}")
    return Flavor.from_model(known[name])


def _filled(value: Any, values: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(entry, values) for key, entry in value.items()}
    if isinstance(value, list):
        return [_filled(entry, values) for entry in value]
    return PLACEHOLDER.sub(lambda match: values[match[1]], value) if isinstance(value, str) else value


def _hint(name: str, known: Any) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {nearest[0]}?" if nearest else f" There is {', '.join(sorted(known))}."


def _list(names: Any) -> str:
    return ", ".join(f"<{name}>" for name in sorted(names)) or "none"
