from ultrathink_model.evaluation.result import EvaluationResult, MediaAnswer
from ultrathink_model.reporting.page import report_html
from ultrathink_model.tracking.run_folder import RunFolder

PICTURE = "data:image/png;base64,AAAA"


def with_answers(folder, said):
    """Adds an evaluation of images to a run folder."""
    file = RunFolder(folder).evaluation_file
    result = EvaluationResult.load(file)
    metrics = {
        "eval/multimodal/image_accuracy": 0.96,
        "eval/multimodal/image_accuracy_stderr": 0.01,
        "eval/multimodal/image_accuracy_withheld": 0.1,
        "eval/multimodal/image_accuracy_withheld_stderr": 0.02,
    }
    answer = MediaAnswer(
        kind="image", prompt="<image> shows", answer="seven", said=said, withheld="<b>two</b>", pictures=[PICTURE]
    )
    changes = {"metrics": result.metrics | metrics, "media_answers": [answer]}
    result.model_copy(update=changes).save(file)
    return folder


def test_accuracies_pictures_and_answers_have_a_section(make_stage):
    page = report_html([with_answers(make_stage("seeing", [{"train/loss": 1.0}]), "seven")], "run")
    section = page[page.index('<section id="multimodal">') :]
    assert "96.0 % ± 1.0" in section
    assert "10.0 % ± 2.0" in section
    assert f'<img src="{PICTURE}" alt="image">' in section
    assert "<strong>seven</strong>, right" in section
    assert "&lt;image&gt; shows" in section
    assert "&lt;b&gt;two&lt;/b&gt;" in section


def test_a_wrong_answer_is_told_with_the_right_one(make_stage):
    page = report_html([with_answers(make_stage("seeing", [{"train/loss": 1.0}]), "")], "run")
    assert "<strong>(no word)</strong>, but it is seven" in page


def test_a_model_of_text_alone_has_no_such_section(make_stage):
    assert 'id="multimodal"' not in report_html([make_stage("reading", [{"train/loss": 1.0}])], "run")


def test_the_load_of_experts_is_drawn_for_each_modality_that_there_was(make_stage):
    load = {"train/moe/max_load": 1.5, "train/moe/text/max_load": 1.4, "train/moe/image/max_load": 3.0}
    rows = [{"tokens": 100 * step, "train/loss": 1.0, **load} for step in (1, 2)]
    page = report_html([make_stage("seeing", rows)], "run")
    assert "Fullest expert by images alone" in page
    assert "Fullest expert by text alone" in page
    assert "Fullest expert by sound alone" not in page
