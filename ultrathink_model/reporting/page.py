"""The page: the sections that the stages have something for, in one HTML file that needs nothing beside it."""

import base64
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ultrathink_model.errors import DataError
from ultrathink_model.reporting import alignment, comparison, curves, measures, multimodal, routing, tables
from ultrathink_model.reporting.stages import Stage, read_stage

# The palette of the style sheet has this many stage colours.
COLOURS = 6


def write_report(folders: Sequence[Path], destination: Path, title: str) -> Path:
    """Writes the report of some run folders, in the order in which the stages ran, as one HTML file.

    Args:
        folders: Run folders; what one of them lacks is left out of the page.
        destination: The file, replaced in one step.
        title: Heading of the page, plain text.

    Returns:
        `destination`.

    Raises:
        DataError: A folder does not exist, or none was given.
    """
    return write_page(report_html(folders, title), destination)


def write_page(text: str, destination: Path) -> Path:
    """Writes a page in one step, and returns where it is."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, destination)
    return destination


def report_html(folders: Sequence[Path], title: str) -> str:
    """The same page as text. Every value in it is escaped, and nothing but its own script may run in it."""
    stages = read_stages(folders)
    curves.set_offsets(stages)
    return render(title, _content(stages))


def comparison_html(folders: Sequence[Path], title: str) -> str:
    """A page that lays two runs side by side: what differs, and their curves on the same axes.

    Args:
        folders: Two run folders.
        title: Heading of the page, plain text.

    Raises:
        DataError: A folder does not exist.
    """
    stages = read_stages(folders)
    content = _content(stages)
    # Areas that lie on each other show neither run.
    routing_charts = [chart for chart in routing.routing_charts(stages) if chart.series[0].style != "area"]
    headline = comparison.headline(*stages)
    rows = comparison.metric_rows(*stages)
    return render(title, content | {"routing_charts": routing_charts, "headline": headline, "comparison": rows})


def read_stages(folders: Sequence[Path]) -> list[Stage]:
    """The stages of run folders, told apart by name and colour.

    Raises:
        DataError: A folder does not exist, or none was given.
    """
    if not folders:
        raise DataError("a report needs at least one run folder")
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise DataError(f"no run folder at {', '.join(missing)}; a report is made from folders that training wrote")
    return _with_distinct_names([read_stage(folder, number % COLOURS) for number, folder in enumerate(folders)])


def render(title: str, content: dict[str, object]) -> str:
    """The page around its content."""
    script = _asset("report.js")
    return (
        _environment()
        .get_template("report.html")
        .render(
            title=title,
            style=Markup(_asset("report.css")),
            script=Markup(script),
            shown=measures.shown,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            **content,
        )
    )


def _with_distinct_names(stages: list[Stage]) -> list[Stage]:
    """The stages, those that share a name with another told apart by their place."""
    names = [stage.name for stage in stages]
    for place, stage in enumerate(stages, start=1):
        if names.count(stage.name) > 1:
            stage.name = f"{stage.name} ({place})"
    return stages


def _content(stages: list[Stage]) -> dict[str, object]:
    return {
        "stages": stages,
        "problems": [problem for stage in stages for problem in stage.problems],
        "headline": tables.headline(stages),
        "stage_facts": [(stage, tables.stage_facts(stage)) for stage in stages],
        "evaluation_rows": measures.evaluation_rows(stages),
        "evaluated": [stage for stage in stages if stage.evaluation],
        "measure_tables": measures.measure_tables(stages),
        "measure_charts": measures.measure_charts(stages),
        "decisions": [stage for stage in stages if stage.decision],
        "loss_chart": curves.loss_chart(stages),
        "engine_charts": curves.engine_charts(stages),
        "heat_maps": routing.heat_maps(stages),
        "source_maps": routing.source_maps(stages),
        "readings": routing.readings(stages),
        "path_shares": routing.path_shares(stages),
        "routing_charts": routing.routing_charts(stages),
        "alignment_charts": alignment.alignment_charts(stages),
        "alignment_facts": [(stage, facts) for stage in stages if (facts := alignment.alignment_facts(stage))],
        "alignment_samples": [(stage, stage.samples) for stage in stages if stage.samples],
        "media_rows": multimodal.media_rows(stages),
        "media_answers": multimodal.media_answers(stages),
        "comparison": [],
        "prompts": tables.samples_by_prompt(stages),
        "differences": tables.config_differences(stages) if len(stages) > 1 else [],
    }


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("ultrathink_model.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
