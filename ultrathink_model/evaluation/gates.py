"""Gates: bounds that a model's figures must keep before anything goes on with it."""

import math
import operator
from collections.abc import Mapping

from ultrathink_model.config.gates import split_bound
from ultrathink_model.errors import GateError

KEPT = {"<=": operator.le, ">=": operator.ge}


def check_gates(gates: Mapping[str, str], metrics: Mapping[str, float], name: str) -> None:
    """Compares figures with their bounds.

    Args:
        gates: `evaluation.gates`: a bound such as `>= 0.9` for each metric.
        metrics: What was measured.
        name: Name of the run, for the message.

    Raises:
        GateError: A bound is not kept, or its metric was not measured; the message names all of them.
    """
    broken = []
    for metric, bound in gates.items():
        sign, limit = split_bound(bound)
        value = metrics.get(metric)
        if value is None:
            measured = ", ".join(sorted(known for known in metrics if known.startswith("eval/"))) or "nothing"
            broken.append(
                f"{metric} {sign} {limit:g} cannot be checked, since it was not measured (there is {measured})"
            )
        elif math.isnan(value) or not KEPT[sign](value, limit):
            broken.append(f"{metric} is {value:.6g}, and evaluation.gates asks for {sign} {limit:g}")
    if broken:
        raise GateError(f"{name} does not pass its gates: {'; '.join(broken)}. Train a better model, or move the gate.")
