import json
import re
import shutil

import pytest
from stage_metrics import training_rows

from ultrathink_model.config.gates import Gate
from ultrathink_model.errors import ConfigError
from ultrathink_model.evaluation.result import ContextLoss, EvaluationResult, ReliabilityBin
from ultrathink_model.promotion.decision import decide
from ultrathink_model.reporting import compare, report_html
from ultrathink_model.reporting.page import comparison_html

GATE = Gate(metric="eval/validation/bits_per_byte", direction="lower", allowed_regression=0.02)


@pytest.fixture
def measured(make_stage):
    """A stage with standard errors, BLiMP, calibration and context, in the folder of an earlier run."""

    def make(name, bits, accuracy):
        folder = make_stage(name, training_rows(8, 5), bits=bits)
        result = EvaluationResult.load(folder / "evaluation.json")
        more = {
            "eval/validation/bits_per_byte_stderr": 0.003,
            "eval/blimp/accuracy": accuracy,
            "eval/blimp/accuracy_stderr": 0.01,
            "eval/blimp_order/accuracy": 0.9,
            "eval/context/loss_from_0": 5.0,
        }
        result.model_copy(
            update={
                "metrics": result.metrics | more,
                "reliability": [ReliabilityBin(confidence=c, accuracy=c, tokens=9) for c in (0.1, 0.9)],
                "context": [ContextLoss(first=f, last=2 * f, loss=5.0, stderr=0.1, tokens=9) for f in (16, 32)],
            }
        ).save(folder / "evaluation.json")
        return folder

    return make


def test_figures_stand_with_their_standard_errors_and_those_of_the_run_before(measured):
    folder = measured("run", 1.6, 0.62)
    (folder / "previous" / "old").mkdir(parents=True)
    earlier = json.loads((folder / "evaluation.json").read_text())
    earlier["metrics"] |= {"eval/validation/bits_per_byte": 1.7, "eval/blimp/accuracy": 0.55}
    (folder / "previous" / "old" / "evaluation.json").write_text(json.dumps(earlier))
    html = report_html([folder], "Run")
    assert '1.600 <small>± 0.003</small><small class="before">before 1.700</small>' in html
    assert '0.620 <small>± 0.010</small><small class="before">before 0.550</small>' in html
    assert "_stderr" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)
    assert {"BLiMP by paradigm", "Loss by position"} <= set(re.findall(r"<summary>([^<]*)</summary>", html))
    assert {"Calibration", "Loss by position"} <= set(re.findall(r"<figcaption><strong>([^<]*)</strong>", html))


def test_the_gates_are_shown_with_their_verdicts(measured):
    folder = measured("run", 1.6, 0.62)
    metrics = EvaluationResult.load(folder / "evaluation.json").metrics
    decide([GATE], metrics, {GATE.metric: 1.5}, name="run", production_version=4).save(folder / "gates.json")
    html = report_html([folder], "Run")
    assert 'class="refused"' in html
    assert "0.1 worse than the 1.5 of version 4 in production" in html
    decide([GATE], metrics, {GATE.metric: 1.59}, name="run", production_version=4).save(folder / "gates.json")
    assert "run passes 1 gate, beside version 4." in report_html([folder], "Run")


def test_two_runs_lie_side_by_side(measured):
    folders = [measured("left", 1.6, 0.62), measured("right", 1.5, 0.63)]
    html = comparison_html(folders, "left and right")
    assert "right needs 1.500 bits for each byte of held-out text, 0.100 fewer than left." in html
    rows = dict(re.findall(r'<tr><th scope="row">(eval/[^<]*)</th>(.*?)</tr>', html))
    assert "−0.100" in rows["eval/validation/bits_per_byte"]
    assert "23.6 standard errors" in rows["eval/validation/bits_per_byte"]
    assert "within noise" in rows["eval/blimp/accuracy"]
    # Both curves begin at the same place of the axis.
    starts = re.findall(r'class="faint stage-\d" d="M([\d.]+) ', html)
    assert starts[:2] == ["0.0", "0.0"]
    assert "Key that differs" not in html or "output.output_dir" not in html


def test_compare_prints_the_figures_and_writes_the_page(measured, tmp_path, capsys):
    left, right = measured("left", 1.6, 0.62), measured("right", 1.5, 0.63)
    compare.main([str(left), str(right), "--output", str(tmp_path / "pages" / "both.html")])
    output = capsys.readouterr().out
    assert re.search(r"eval/validation/bits_per_byte +1\.600 ± 0\.003 +1\.500 ± 0\.003 +−0\.100\n", output)
    assert re.search(r"eval/blimp/accuracy .*\(noise\)", output)
    assert (tmp_path / "pages" / "both.html").is_file()
    shutil.rmtree(right)
    with pytest.raises(ConfigError, match="holds no run"):
        compare.main([str(left), str(right)])


def test_runs_on_different_data_are_said_to_be(measured):
    folders = [measured("left", 1.6, 0.62), measured("right", 1.5, 0.63)]
    other = EvaluationResult.load(folders[1] / "evaluation.json").model_copy(update={"data_fingerprint": "g"})
    other.save(folders[1] / "evaluation.json")
    assert "evaluated on different data" in comparison_html(folders, "both")
