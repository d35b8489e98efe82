"""Bounds on metrics, as the config spells them."""

import re

BOUND = re.compile(r"(<=|>=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


def split_bound(text: str) -> tuple[str, float]:
    """The sign and the number of a bound.

    Raises:
        ValueError: It is none.
    """
    found = BOUND.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no bound; write one such as '>= 0.9' or '<= 1.7'")
    return found[1], float(found[2])
