"""What a run's folder holds, read for the report: what is missing stays empty, what cannot be read is named."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ultrathink_model.evaluation.result import EvaluationResult
from ultrathink_model.promotion.decision import Decision
from ultrathink_model.tracking.metrics import read_metrics
from ultrathink_model.tracking.run_folder import RunFolder

Content = TypeVar("Content")


class AlignmentSample(BaseModel):
    """One prompt before and after alignment, with the reward model's scores."""

    prompt: str
    before: str
    after: str
    reward_before: float
    reward_after: float


class RoutingRecord(BaseModel):
    """The content of `routing.json`: where tokens went in the last step.

    Attributes:
        load: Share of the tokens that each expert took, one row a mixture layer; each row sums to 1.
        groups: Experts of each group, in the order of their ranges.
        group_share: Share of the tokens of each group's sources (rows) that each group's experts took (columns); rows of
            groups without a source hold nothing but None.
        paths: Share of tokens on the fast, standard, deep and ultra-deep path, one row a routed layer.
    """

    model_config = ConfigDict(populate_by_name=True)

    load: list[list[float]] = Field(default=[], alias="moe/load")
    groups: dict[str, int] = {}
    group_share: list[list[float | None]] = Field(default=[], alias="moe/group_share")
    paths: list[list[float]] = Field(default=[], alias="dre/paths")


@dataclass
class Stage:
    """One run folder, as far as it can be read.

    Attributes:
        previous: The evaluation of the run that was in this folder before.
        decision: Whether its model may go into production, where that was asked.
        offset: Where the stage begins on an axis of tokens that it shares with others.
    """

    name: str
    folder: Path
    number: int
    status: str = ""
    config_text: str = ""
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    evaluation: EvaluationResult | None = None
    previous: EvaluationResult | None = None
    decision: Decision | None = None
    samples: list[AlignmentSample] = field(default_factory=list)
    routing: RoutingRecord | None = None
    problems: list[str] = field(default_factory=list)
    offset: float = 0.0

    def curve(self, metric: str, axis: str = "tokens") -> tuple[list[float], list[float]]:
        """The logged values of a metric against `tokens` or `step`, without those that are not finite."""
        points = [
            (row[axis], row[metric])
            for row in self.rows
            if axis in row and metric in row and math.isfinite(row[metric]) and math.isfinite(row[axis])
        ]
        return [x for x, _ in points], [y for _, y in points]

    def last(self, metric: str) -> float | None:
        """The newest finite value of a metric; None where it was never logged."""
        values = self.curve(metric, "step")[1]
        return values[-1] if values else None

    def metric_names(self, prefix: str) -> list[str]:
        """The names that begin with `prefix` and were logged at least once, in the order of their first line."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name.startswith(prefix)))

    def setting(self, section: str, key: str) -> Any:
        """A value of the resolved config; None where it is not known."""
        return self.config.get(section, {}).get(key)


def read_stage(folder: Path, number: int) -> Stage:
    """Reads a run's folder; a file that is damaged is named in `problems` and left out."""
    paths = RunFolder(folder)
    record = paths.record()
    stage = Stage(record.run_name if record else folder.name, folder, number, record.status if record else "")

    def read(path: Path, parse: Callable[[Path], Content]) -> Content | None:
        if not path.exists():
            return None
        try:
            return parse(path)
        except (OSError, ValueError, yaml.YAMLError) as error:
            stage.problems.append(f"{path} cannot be read and is left out: {_reason(error)}")
            return None

    stage.config_text = read(paths.config_file, lambda path: path.read_text(encoding="utf-8")) or ""
    stage.config = read(paths.config_file, _read_config) or {}
    stage.rows = read(paths.metrics_file, read_metrics) or []
    stage.evaluation = read(paths.evaluation_file, EvaluationResult.load)
    earlier = sorted((folder / "previous").glob("*/evaluation.json"), key=lambda path: path.stat().st_mtime)
    stage.previous = read(earlier[-1], EvaluationResult.load) if earlier else None
    stage.decision = read(paths.gates_file, Decision.load)
    stage.routing = read(paths.routing_file, lambda path: RoutingRecord.model_validate_json(path.read_bytes()))
    stage.samples = read(paths.samples_file, _read_samples) or []
    return stage


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    return TypeAdapter(dict[str, dict[str, Any]]).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))


def _read_samples(path: Path) -> list[AlignmentSample]:
    return TypeAdapter(list[AlignmentSample]).validate_json(path.read_bytes())


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return " ".join(str(error).split())
