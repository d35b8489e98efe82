"""The flags of the guard, which chat and the server share."""

import argparse

from ultrathink_model.errors import ConfigError


def add_guard_flags(parser: argparse.ArgumentParser) -> None:
    """`--guard P` and `--no-guard`."""
    parser.add_argument(
        "--guard", type=float, default=0.5, metavar="P", help="probability of harm at which the guard steps in (0.5)"
    )
    parser.add_argument("--no-guard", action="store_true", help="answer without the guard")


def guard_threshold(given: argparse.Namespace) -> float | None:
    """The probability at which the guard steps in; None without it.

    Raises:
        ConfigError: It is no probability.
    """
    if not 0 <= given.guard <= 1:
        raise ConfigError(f"--guard {given.guard} must be a probability, from 0 to 1.")
    return None if given.no_guard else float(given.guard)
