"""What stages of the tests log, and what a hostile model might write."""

import math

HOSTILE = "</p></script><script>window.harmed = true</script><img src=x onerror='window.harmed = true'>"


def training_rows(first: float, last: float, steps: int = 40) -> list[dict[str, float]]:
    """Lines of a loss that falls from `first` towards `last`."""
    return [
        {
            "tokens": 4096 * step,
            "train/loss": last + (first - last) * math.exp(-step / 10),
            "train/learning_rate": 1e-3,
            "train/grad_norm": 1.0 + 0.1 * (step % 3),
            "train/tokens_per_second": 6800.0,
        }
        | ({"val/loss": last + (first - last) * math.exp(-step / 10)} if step % 10 == 0 else {})
        for step in range(1, steps + 1)
    ]
