"""Trains one run from flags: every key of the config is a flag of its own, and no file is needed.

python train_ultrathink.py --dataset wikitext --hidden_size 512 --num_layers 6 --enable_moe --use_mlflow
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ultrathink_model.command_line import ArgumentParser, log_to_terminal, require_packages, run_and_exit

# Where several sections have a key of one name, these have it plain (`--batch_size` is training's) and the others
# with their section before it (`--evaluation_batch_size`).
PLAIN_SECTIONS = ("model", "advanced", "training", "data", "logging")


def make_parser() -> ArgumentParser:
    """The flags of train_ultrathink.py, made from the config's models."""
    parser = ArgumentParser(prog="train_ultrathink.py", description=__doc__ or "")
    parser.add_argument("--config", metavar="FILE", help="a YAML file that the flags are put on top of")
    parser.add_argument("--init-from", metavar="FOLDER", help="a final_model/ to take the first weights from")
    parser.add_argument("--run-name", default="train_ultrathink", metavar="NAME", help="name of the run")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="ignored: set by launchers")
    _add_keys(parser)
    return parser


def main() -> None:
    """Parses the flags and trains.

    Raises:
        UltrathinkError: A mistake of the user's, or a stop by a signal.
    """
    arguments = make_parser().parse_args()
    from ultrathink_model.config import load_config, make_config  # noqa: PLC0415 - after the packages are checked

    given = {name: value for name, value in vars(arguments).items() if "." in name and value is not None}
    overrides = [f"{key}={value}" for key, value in given.items()]
    if arguments.config:
        config = load_config(arguments.config, overrides)
    else:
        config = make_config({}, overrides, origin="train_ultrathink.py")
    log_to_terminal(config.logging.log_level)
    from ultrathink_model.stage import describe_results, run_stage  # noqa: PLC0415 - torch takes seconds to import

    init_from = Path(arguments.init_from) if arguments.init_from else None
    run_stage(config, init_from=init_from, run_name=arguments.run_name)
    describe_results(config)


def _add_keys(parser: ArgumentParser) -> None:
    from ultrathink_model.config.describe import describe_config  # noqa: PLC0415 - after the packages are checked

    sections = describe_config()
    owners: dict[str, list[str]] = {}
    for section in sections:
        for key in section.keys:
            owners.setdefault(key.name, []).append(section.name)
    for section in sections:
        group = parser.add_argument_group(section.name, section.description)
        for key in section.keys:
            # Argparse reads % as the start of a format.
            text = f"{key.description} ({key.type}; default {key.default})".replace("%", "%%")
            flag = _flag(key.section, key.name, owners[key.name])
            if key.type == "bool":
                group.add_argument(flag, dest=key.path, action=argparse.BooleanOptionalAction, help=text)
            else:
                group.add_argument(flag, dest=key.path, metavar="VALUE", help=text)


def _flag(section: str, name: str, owners: list[str]) -> str:
    plain = [owner for owner in owners if owner in PLAIN_SECTIONS]
    is_plain = len(owners) == 1 or plain[:1] == [section]
    return f"--{name}" if is_plain else f"--{section}_{name}"


if __name__ == "__main__":
    require_packages("train_ultrathink.py")
    run_and_exit(main)
