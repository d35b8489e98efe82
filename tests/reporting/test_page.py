import json
import re
from html.parser import HTMLParser

import pytest
from stage_metrics import HOSTILE, training_rows

from ultrathink_model.errors import DataError
from ultrathink_model.reporting import report_html, write_report


class Elements(HTMLParser):
    """The tags of a page with their attributes, and the text of those that were asked for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def names(self) -> set[str]:
        return {tag for tag, _ in self.found}


def headings(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


def test_report_covers_every_stage(stages, tmp_path):
    path = write_report(stages, tmp_path / "deep/report.html", "Production")
    html = path.read_text(encoding="utf-8")
    assert headings(html) == ["Evaluation", "Training", "Routing", "Alignment", "Samples", "Config"]
    assert re.findall(r'<span class="swatch stage-(\d)"></span>(\w+) <span class="status', html) == [
        ("0", "base"),
        ("1", "experts"),
        ("2", "aligned"),
    ]
    assert "aligned needs 1.510 bits for each byte of held-out text, 0.020 more than a bigram model" in html
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_text_is_coloured_by_depth(stages):
    html = report_html(stages, "Production")
    pieces = re.findall(r'<span class="(deep)?" style="--heat:([\d.]+)%" title="([^"]*)">([^<]*)</span>', html)
    assert pieces == [
        ("", "0.0", "0 passes", "The"),
        ("deep", "100.0", "3 passes", " &lt;b&gt;state"),
        ("", "16.7", "0.5 passes", " of"),
    ]
    assert "1.17 over the text" in html


def test_sources_are_shown_beside_the_experts_they_went_to(stages):
    html = report_html(stages, "Production")
    table = re.search(r"Sources and experts.*?<tbody>(.*?)</tbody>", html, flags=re.DOTALL)
    assert table
    rows = re.findall(r'<th scope="row">(\w+)</th>(.*?)</tr>', table[1])
    assert [name for name, _ in rows] == ["skill"]
    cells = re.findall(r'<td class="number( own)?"><i[^>]*></i>([\d.]+) % <small>([\d.]+)×</small>', rows[0][1])
    assert cells == [("", "40.0", "0.80"), (" own", "50.0", "2.00"), ("", "5.0", "0.40"), ("", "5.0", "0.40")]


def test_page_stays_small(stages):
    assert len(report_html(stages, "Production")) < 300_000


def test_long_runs_do_not_make_long_pages(make_stage):
    long = make_stage("long", [row | {"val/loss": row["train/loss"]} for row in training_rows(9, 3, steps=5000)])
    short = make_stage("short", [row | {"val/loss": row["train/loss"]} for row in training_rows(9, 3, steps=500)])
    assert len(report_html([long], "")) < 1.2 * len(report_html([short], ""))


def test_everything_that_a_model_or_user_wrote_is_escaped(make_stage):
    stage = make_stage("<i>run</i>", training_rows(8, 5), [f"data.dataset={json.dumps('<script>alert(1)</script>')}"])
    html = report_html([stage], "<script>alert(2)</script>")
    assert HOSTILE not in html
    elements = Elements(html)
    assert [tag for tag, _ in elements.found].count("script") == 1
    assert not {"img", "iframe", "b"} & elements.names()
    assert not [attributes for _, attributes in elements.found if any(name.startswith("on") for name in attributes)]


def test_page_needs_nothing_beside_it(stages):
    html = report_html(stages, "Production")
    for tag, attributes in Elements(html).found:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    assert "url(" not in html
    assert "@import" not in html


def test_what_a_run_does_not_have_is_left_out(make_stage, tmp_path):
    stage = make_stage("dense", training_rows(8, 5))
    (stage / "evaluation.json").unlink()
    html = report_html([stage], "Dense")
    assert headings(html) == ["Training", "Config"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert headings(report_html([empty], "Nothing yet")) == []


def test_torn_and_missing_numbers_do_not_break_the_page(make_stage):
    stage = make_stage("torn", training_rows(8, 5))
    with (stage / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "time": 1, "tokens": 167936, "train/loss": NaN}\n')
        file.write('{"step": 42, "time": 1, "tokens": 172032, "train/loss": null, "train/grad_norm": Infinity}\n')
        file.write('{"step": 43, "tok')
    html = report_html([stage], "Torn")
    assert "Training" in headings(html)
    assert not re.search(r'd="[^"]*(nan|inf)', html, flags=re.IGNORECASE)


def test_damaged_files_are_named_and_the_rest_is_shown(make_stage):
    stage = make_stage("damaged", training_rows(8, 5))
    (stage / "evaluation.json").write_text('{"metrics": ')
    (stage / "routing.json").write_text('{"moe/load": "much"}')
    html = report_html([stage], "Damaged")
    problems = re.search(r'<ul class="problems">(.*?)</ul>', html)
    assert problems
    assert "evaluation.json" in problems[1]
    assert "routing.json" in problems[1]
    assert headings(html) == ["Training", "Config"]


def test_stages_of_one_name_are_told_apart(make_stage, tmp_path):
    first = make_stage("same", training_rows(8, 5)).rename(tmp_path / "first")
    second = make_stage("same", training_rows(5, 4))
    html = report_html([first, second], "Twice")
    assert "same (1), training" in html
    assert "same (2), training" in html


def test_a_model_whose_loss_is_not_finite_is_shown_as_such(make_stage):
    stage = make_stage("diverged", training_rows(8, 5), bits=float("inf"))
    html = report_html([stage], "Diverged")
    assert "not finite" in html
    assert "Evaluation" in headings(html)


@pytest.mark.parametrize("folders", [[], ["nowhere"]])
def test_report_of_nothing_is_refused(folders, tmp_path):
    with pytest.raises(DataError):
        write_report([tmp_path / folder for folder in folders], tmp_path / "report.html", "")
    assert not (tmp_path / "report.html").exists()
