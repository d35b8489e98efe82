"""What the command lines share: the check for packages, errors as messages, exit codes. Needs no package itself."""

import argparse
import atexit
import difflib
import importlib.util
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from ultrathink_model.errors import EXIT_OK, EXIT_STOPPED_AFTER_SAVING, TrainingStoppedError, UltrathinkError

if TYPE_CHECKING:
    from ultrathink_model.config import Config

ROOT = Path(__file__).resolve().parents[1]
NEEDED_PACKAGES = ("pydantic", "yaml", "torch", "transformers", "tokenizers", "datasets", "pandera", "rich")


class ArgumentParser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and names the nearest flag to one it does not know."""

    def __init__(self, *, prog: str, description: str, epilog: Callable[[], str] | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._make_epilog = epilog

    def format_help(self) -> str:
        """The help, with an epilog that is only made when somebody asks for it."""
        if self._make_epilog:
            self.epilog = self._make_epilog()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2, the message, and the nearest flag."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
        nearest = difflib.get_close_matches(unknown[1], flags, n=1) if unknown else []
        hint = f" Did you mean {nearest[0]}?" if nearest else f" `{self.prog} --help` lists what there is."
        self.exit(2, f"{self.prog}: {message}.{hint}\n")


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that name a config, for `given_config`."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--profile", default="auto", metavar="NAME", help="auto, tiny, small, medium or large")
    source.add_argument("--config", metavar="FILE", help="a config file in place of a profile's")
    parser.add_argument(
        "--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="section.key=value, …"
    )


def given_config(arguments: argparse.Namespace) -> "Config":
    """The config that the flags of `add_config_flags` name.

    Raises:
        ConfigError: There is no such profile, file or key, or a value breaks a rule.
    """
    from ultrathink_model.config import load_config  # noqa: PLC0415 - this module needs no package
    from ultrathink_model.config.profiles import profile_path, resolve_profile  # noqa: PLC0415

    path = arguments.config or profile_path(resolve_profile(arguments.profile).profile)
    return load_config(path, arguments.override)


def require_packages(script: str, names: Sequence[str] = NEEDED_PACKAGES) -> None:
    """Ends the process with exit code 2 and one line that says how to get the packages, where some are missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if not missing:
        return
    python = Path(".venv") / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    is_set_up = (ROOT / python).exists() and not Path(sys.prefix).is_relative_to(ROOT / ".venv")
    first = "" if is_set_up else "`make setup`, then "
    print(
        f"{script}: this Python ({sys.executable}) has no {', '.join(missing)}: "
        f"run {first}`{python} {script} …` in {ROOT}.",
        file=sys.stderr,
    )
    raise SystemExit(2)


def run_and_exit(main: Callable[[], None]) -> NoReturn:
    """Runs a command and ends the process: a typed error is a message on stderr and its exit code, no traceback.

    SIGTERM outside training, which handles it by itself, ends the command with exit code 75, as Ctrl-C does.
    """
    signal.signal(signal.SIGTERM, _stop)
    exit_code = EXIT_OK
    try:
        main()
    except UltrathinkError as error:
        print(f"{_rank_prefix()}{error}", file=sys.stderr)
        exit_code = error.exit_code
    except KeyboardInterrupt:
        print(f"{_rank_prefix()}interrupted; start the same command again to go on.", file=sys.stderr)
        exit_code = EXIT_STOPPED_AFTER_SAVING
    if "RANK" in os.environ:
        end_rank(exit_code)
    raise SystemExit(exit_code)


def end_rank(exit_code: int) -> NoReturn:
    """Ends this process as `sys.exit` does, but leaves the interpreter standing.

    Gloo's threads let go of tensors when they like. One that does so while the interpreter is torn down aborts the
    process, and a finished rank looks like one that was killed (https://github.com/pytorch/pytorch/pull/179291).
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(exit_code)


def log_to_terminal(level: str) -> None:
    """Shows what the package logs on stderr, on the first rank alone; results and progress go to stdout."""
    logger = logging.getLogger("ultrathink_model")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())
    logger.setLevel(level if os.environ.get("RANK", "0") == "0" else logging.ERROR)


class _StderrHandler(logging.Handler):
    """Prints messages to what `sys.stderr` is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def _stop(signal_number: int, frame: FrameType | None) -> NoReturn:
    name = signal.Signals(signal_number).name
    raise TrainingStoppedError(f"stopped by {name}; start the same command again to go on.")


def _rank_prefix() -> str:
    """Ranks other than the first say who they are, so that their copy of a message is known for one."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[rank {rank}] "
