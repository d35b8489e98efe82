"""`run.py promote`: puts a run's model into production if it passes its gates, or a version that is registered."""

from pathlib import Path

from ultrathink_model.command_line import ArgumentParser, add_config_flags, given_config
from ultrathink_model.config import Config, load_config
from ultrathink_model.errors import ConfigError
from ultrathink_model.promotion.promote import judge_run, promote_run
from ultrathink_model.promotion.registry import ModelRegistry
from ultrathink_model.tracking.run_folder import find_run


def make_parser() -> ArgumentParser:
    """The flags of `run.py promote`."""
    parser = ArgumentParser(prog="run.py promote", description=__doc__ or "")
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="folder of a run, or of a workflow, whose last stage counts"
    )
    parser.add_argument(
        "--version", type=int, metavar="N", help="a registered version in place of a run; no gate is asked"
    )
    add_config_flags(parser)
    return parser


def main(arguments: list[str]) -> None:
    """Promotes, and says what is in production now.

    Raises:
        GateError: The model does not pass its gates.
        UltrathinkError: There is no such run or version, or the registry cannot be asked.
    """
    given = make_parser().parse_args(arguments)
    if (given.run is None) == (given.version is None):
        raise ConfigError("run.py promote takes either the folder of a run or --version N.")
    if given.version is not None:
        promote_version(given_config(given), given.version)
        return
    run = find_run(Path(given.run))
    config = load_config(given.config or run.config_file, given.override)
    decision, record = judge_run(run, config), run.record()
    decision.check()
    version = promote_run(run, config, decision, run.final_model, record.mlflow_run_id if record else None)
    print(f"{decision.reason} Version {version.number} of {config.promotion.registered_model} is in production.")


def promote_version(config: Config, number: int) -> None:
    """Gives a registered version the alias."""
    registry = ModelRegistry(config)
    before = registry.promote(registry.version(number))
    print(
        f"Version {number} of {registry.name} is in production, after {f'version {before.number}' if before else 'none'}."
    )
