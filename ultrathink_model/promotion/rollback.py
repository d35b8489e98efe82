"""`run.py rollback`: puts the version back into production that was there before."""

from ultrathink_model.command_line import ArgumentParser, add_config_flags, given_config
from ultrathink_model.promotion.registry import ModelRegistry


def make_parser() -> ArgumentParser:
    """The flags of `run.py rollback`."""
    parser = ArgumentParser(prog="run.py rollback", description=__doc__ or "")
    add_config_flags(parser)
    return parser


def main(arguments: list[str]) -> None:
    """Rolls back, and says what is in production now.

    Raises:
        RegistryError: There is no earlier version, or the registry cannot be asked.
    """
    registry = ModelRegistry(given_config(make_parser().parse_args(arguments)))
    before, now = registry.rollback()
    print(f"Version {now.number} of {registry.name} is in production again, in place of version {before.number}.")
