"""`run.py compare`: lays two runs side by side, in a page and in the terminal."""

from pathlib import Path

from ultrathink_model.command_line import ArgumentParser
from ultrathink_model.reporting.comparison import MetricRow, headline, metric_rows
from ultrathink_model.reporting.page import comparison_html, read_stages, write_page
from ultrathink_model.tracking.run_folder import find_run

SHOWN = ("eval/validation/", "val/", "train/", "eval/blimp/")


def make_parser() -> ArgumentParser:
    """The flags of `run.py compare`."""
    parser = ArgumentParser(prog="run.py compare", description=__doc__ or "")
    parser.add_argument(
        "runs", nargs=2, metavar="RUN", help="folder of a run, or of a workflow, whose last stage counts"
    )
    parser.add_argument("--output", default="compare.html", metavar="FILE", help="the page (compare.html)")
    return parser


def main(arguments: list[str]) -> None:
    """Writes the page, and prints the figures that matter most.

    Raises:
        ConfigError: A folder holds no run.
    """
    given = make_parser().parse_args(arguments)
    folders = [find_run(Path(run)).path for run in given.runs]
    first, second = read_stages(folders)
    rows = [row for row in metric_rows(first, second) if row.name.startswith(SHOWN)]
    print(f"{'':40}{first.name:>22}{second.name:>22}{'difference':>14}")
    print("\n".join(_line(row) for row in rows))
    print(headline(first, second))
    page = write_page(comparison_html(folders, f"{first.name} and {second.name}"), Path(given.output))
    print(f"All of it, with curves and settings: {page.resolve()}")


def _line(row: MetricRow) -> str:
    noise = "  (noise)" if row.deviations is not None and row.deviations < 2 else ""
    return f"{row.name:40}{row.values[0]:>22}{row.values[1]:>22}{row.difference:>14}{noise}"
