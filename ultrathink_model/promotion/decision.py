"""Whether a model may go into production: each gate's verdict, and the decision that follows."""

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from ultrathink_model.config.gates import Gate
from ultrathink_model.errors import GateError
from ultrathink_model.evaluation.result import SavedRecord


class Verdict(BaseModel):
    """One gate beside what was measured.

    Attributes:
        gate: The gate.
        value: The model's figure; None where it was not measured.
        production: That of the model in production; None where there is none.
        failure: Why the gate is not passed; empty where it is.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    gate: Gate
    value: float | None
    production: float | None
    failure: str = ""


class Decision(SavedRecord):
    """The content of `gates.json`.

    Attributes:
        name: The model's name.
        verdicts: One for each gate.
        production_version: The version that it was compared with; None where production was empty.
    """

    name: str
    verdicts: list[Verdict]
    production_version: int | None = None

    @property
    def passed(self) -> bool:
        """Whether every gate is."""
        return not any(verdict.failure for verdict in self.verdicts)

    @property
    def reason(self) -> str:
        """The decision in one line."""
        failures = [verdict.failure for verdict in self.verdicts if verdict.failure]
        if failures:
            return f"{self.name} is not promoted: {'; '.join(failures)}."
        beside = f", beside version {self.production_version}" if self.production_version is not None else ""
        return f"{self.name} passes {len(self.verdicts)} gate{'s' if len(self.verdicts) != 1 else ''}{beside}."

    def check(self) -> None:
        """Lets a model through that passed.

        Raises:
            GateError: It did not.
        """
        if not self.passed:
            raise GateError(self.reason)


def decide(
    gates: Sequence[Gate],
    metrics: Mapping[str, float],
    production: Mapping[str, float] | None,
    *,
    name: str,
    production_version: int | None = None,
) -> Decision:
    """Compares a model with its gates.

    A metric that was not measured, or is not a number, fails its gate; one that the model in production lacks has nothing
    to fall behind. A gate with `where_measured` is left out where neither of them has its metric, so that what production
    was measured by cannot be got round by measuring less.

    Args:
        gates: The gates.
        metrics: What was measured of the model.
        production: The same of the model in production; None where there is none.
        name: The model's name.
        production_version: Version of the model in production.
    """
    verdicts = []
    for gate in gates:
        value, before = metrics.get(gate.metric), (production or {}).get(gate.metric)
        if gate.where_measured and value is None and before is None:
            continue
        failure = _failure(gate, value, before, production_version)
        verdicts.append(Verdict(gate=gate, value=value, production=before, failure=failure))
    return Decision(name=name, verdicts=verdicts, production_version=production_version)


def _failure(gate: Gate, value: float | None, before: float | None, version: int | None) -> str:
    if value is None:
        beside = "" if before is None else f", and was {before:.6g} of version {version} in production"
        return f"{gate.metric} was not measured{beside}"
    if math.isnan(value):
        return f"{gate.metric} is not a number"
    sign = 1 if gate.direction == "lower" else -1
    word = "above" if gate.direction == "lower" else "below"
    if gate.bound is not None and sign * value > sign * gate.bound:
        return f"{gate.metric} is {value:.6g}, {word} the bound of {gate.bound:g}"
    if gate.allowed_regression is None or before is None or math.isnan(before):
        return ""
    worse = sign * (value - before)
    if worse <= gate.allowed_regression:
        return ""
    return (
        f"{gate.metric} is {value:.6g}, {worse:.3g} worse than the {before:.6g} of version {version} in production, and "
        f"{gate.allowed_regression:g} is allowed"
    )
