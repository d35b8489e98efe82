"""`run.py export`: a trained model in the formats that others run."""

import logging
from pathlib import Path

from ultrathink_model.command_line import ArgumentParser, log_to_terminal
from ultrathink_model.config import Config, override_config
from ultrathink_model.export.export import export_model


def make_parser() -> ArgumentParser:
    """The flags of `run.py export`."""
    parser = ArgumentParser(prog="run.py export", description=__doc__ or "")
    parser.add_argument("model", metavar="MODEL", help="final_model/ of a run, or another Hugging Face folder of ours")
    parser.add_argument("folder", metavar="FOLDER", help="where the export goes; an older one is replaced as a whole")
    parser.add_argument(
        "--override",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="of the section export, as in 'export.formats=[gguf, onnx_int8]'",
    )
    return parser


def main(arguments: list[str]) -> None:
    """Exports the model.

    Raises:
        UltrathinkError: What `export_model` raises, or a key that cannot be used.
    """
    given = make_parser().parse_args(arguments)
    settings = override_config(Config(), given.override).export
    log_to_terminal("INFO")
    logging.getLogger("gguf").setLevel(logging.WARNING)
    export_model(Path(given.model), Path(given.folder), settings)
