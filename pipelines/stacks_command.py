"""`run.py stacks`: registers a stack file with ZenML, as often as one likes, and says what that changes."""

from pathlib import Path

from pipelines.quiet import quiet_zenml
from pipelines.stack_files import apply_stack, read_stack_file
from ultrathink_model.command_line import ArgumentParser
from ultrathink_model.errors import ConfigError


def make_parser() -> ArgumentParser:
    """The flags of `run.py stacks`."""
    parser = ArgumentParser(prog="run.py stacks", description=__doc__ or "")
    parser.add_argument("action", choices=["apply"], help="make ZenML have the stack as the file says")
    parser.add_argument("file", metavar="FILE", help="as stack_configs/sagemaker.yaml")
    parser.add_argument("--dry-run", action="store_true", help="only say what would change")
    parser.add_argument(
        "--values", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="what stands for each <name>"
    )
    return parser


def main(arguments: list[str]) -> None:
    """Applies a stack file and prints each change.

    Raises:
        ConfigError: The file cannot be used.
    """
    given = make_parser().parse_args(arguments)
    quiet_zenml()
    stack = read_stack_file(Path(given.file), _pairs(given.values))
    for change in apply_stack(stack, dry_run=given.dry_run):
        print(change)
    if given.dry_run:
        print("nothing was changed (--dry-run)")
    else:
        print(f"python run.py --workflow production --stack {stack.stack_name}")


def _pairs(values: list[str]) -> dict[str, str]:
    for value in values:
        if "=" not in value:
            raise ConfigError(f"--values {value}: write NAME=VALUE")
    return {name: value for name, _, value in (entry.partition("=") for entry in values)}
