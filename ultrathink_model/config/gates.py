"""Bounds on metrics: as the config spells them, and as a file of gates does."""

import re
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ultrathink_model.config.profiles import CONFIG_FOLDER
from ultrathink_model.config.yaml_text import read_yaml
from ultrathink_model.errors import ConfigError

BOUND = re.compile(r"(<=|>=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")
DEFAULT_FILE = CONFIG_FOLDER / "gates.yaml"


def split_bound(text: str) -> tuple[str, float]:
    """The sign and the number of a bound.

    Raises:
        ValueError: It is none.
    """
    found = BOUND.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no bound; write one such as '>= 0.9' or '<= 1.7'")
    return found[1], float(found[2])


class Gate(BaseModel):
    """What a metric must show before its model goes into production.

    Attributes:
        metric: Its name, as in `eval/validation/loss`.
        direction: Which way is better.
        bound: The worst value that passes.
        allowed_regression: How much worse than the model in production it may be, in the metric's unit.
        where_measured: Whether the gate counts only where the model, or the one in production, has the metric.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    metric: str = Field(min_length=1)
    direction: Literal["lower", "higher"]
    bound: float | None = None
    allowed_regression: float | None = Field(None, ge=0)
    where_measured: bool = False

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if self.bound is None and self.allowed_regression is None:
            raise ValueError(f"the gate of {self.metric} has neither bound nor allowed_regression; give it one")
        return self


def read_gates(path: str | None) -> list[Gate]:
    """Reads a file of gates; None takes the one that comes with the project.

    Raises:
        ConfigError: There is no such file, it is not YAML, or an entry is no gate.
    """
    file = Path(path) if path else DEFAULT_FILE
    try:
        return TypeAdapter(list[Gate]).validate_python(read_yaml(file.read_text(encoding="utf-8")) or [])
    except OSError as error:
        raise ConfigError(f"promotion.gates_file={file}: {error.strerror}; name a YAML file of gates.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"promotion.gates_file={file} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(
            f"promotion.gates_file={file}: {place}: {first['msg']}; each entry is {{metric, direction: lower or higher, "
            "bound and/or allowed_regression}."
        ) from None
