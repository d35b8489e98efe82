"""Numbers as people read them: round ticks for an axis, and short labels with a prefix for thousands."""

import math

NARROW_SPACE = "\u202f"
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def round_ticks(low: float, high: float, target: int, least_step: float = 0.0) -> list[float]:
    """Round numbers within [low, high], about `target` of them, evenly spaced by 1, 2, 2.5 or 5 times a power of ten.

    Args:
        low: First number of the axis.
        high: Last one.
        target: Most ticks wanted; there may be one more.
        least_step: Least distance of two ticks; 1 where only whole numbers mean anything.
    """
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / target))
    step = next((factor * power for factor in (1, 2, 2.5, 5) if span / (factor * power) <= target), 10 * power)
    step = max(step, least_step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(ticks: list[float]) -> list[str]:
    """The ticks of one axis, all in the same unit and with the same number of decimals."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else largest
    if largest and (largest < 0.01 or largest >= 1e15):
        return [_exponential(tick, step) for tick in ticks]
    scale, prefix = next(((scale, prefix) for scale, prefix in PREFIXES if largest >= scale), (1.0, ""))
    decimals = decimals_of(step / scale) if step else 0
    return [f"{tick / scale:.{decimals}f}" + (NARROW_SPACE + prefix if prefix and tick else "") for tick in ticks]


def _exponential(value: float, step: float) -> str:
    """A very small or large number as 7.5e-4; what is a rounding error beside the step is 0."""
    if abs(value) < step * 1e-6:
        return "0"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def decimals_of(step: float) -> int:
    """Decimals that tell multiples of `step` apart, at most 6."""
    return next((count for count in range(6) if abs(round(step, count) - step) < step * 1e-6), 6)


def short(value: float, digits: int = 3) -> str:
    """A number in a few significant digits, with a prefix from a thousand up: 2 240 000 is 2.24 M."""
    if not math.isfinite(value):
        return "not finite"
    for scale, prefix in PREFIXES:
        if abs(value) >= scale:
            return f"{value / scale:.{digits}g}{NARROW_SPACE}{prefix}"
    if value and abs(value) < 1e-3:
        return f"{value:.{digits}g}"
    return f"{value:.{digits}g}" if value != int(value) else str(int(value))


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}{NARROW_SPACE}h {minutes}{NARROW_SPACE}min"
    return f"{minutes}{NARROW_SPACE}min {rest}{NARROW_SPACE}s" if minutes else f"{rest}{NARROW_SPACE}s"
