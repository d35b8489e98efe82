import json

import pytest

from ultrathink_model.data.preferences import load_preferences
from ultrathink_model.data.scored_answers import ScoredAnswer, main, pairs_of_scores, read_scored_answers
from ultrathink_model.errors import DataError

FILE = """# dataset_version=1.0,,
question,reply,human_1,human_2
why?,"because, well",0.5,1.0
why?,no,0,0
why?,empty score,,
what?,this,1,
what?,that,1,1
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text(FILE)
    return path


def test_scores_of_several_people_are_averaged(path):
    assert read_scored_answers([path], "question", "reply", "human") == [
        ScoredAnswer("why?", "because, well", 0.75),
        ScoredAnswer("why?", "no", 0.0),
        ScoredAnswer("what?", "this", 1.0),
        ScoredAnswer("what?", "that", 1.0),
    ]


def test_the_same_answer_in_two_files_counts_once(path):
    assert len(read_scored_answers([path, path], "question", "reply", "human")) == 4


@pytest.mark.parametrize(("lower_is_better", "chosen"), [(True, "no"), (False, "because, well")])
def test_answers_with_different_scores_make_a_pair_with_their_margin(path, lower_is_better, chosen):
    (pair,) = pairs_of_scores(read_scored_answers([path], "question", "reply", "human"), lower_is_better)
    assert (pair.prompt, pair.chosen, pair.margin) == ("why?", chosen, 0.75)


def test_file_that_is_written_is_what_alignment_reads(tmp_path, capsys):
    path = tmp_path / "scores.csv"
    path.write_text("prompt,answer,score\n" + "".join(f"p{n % 4},a{n},{n}\n" for n in range(12)))
    output = tmp_path / "pairs.jsonl"
    assert main([str(path), "--output", str(output)]) == 0
    assert "12 pairs of 4 prompts from 12 answers" in capsys.readouterr().out
    assert json.loads(output.read_text().splitlines()[0])["margin"] == 4
    read = load_preferences(output, 0.25)
    assert len(read.train) + len(read.heldout) == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [("prompt,score\na,1\n", "no column 'answer'"), ("prompt,answer,score\na,b,high\n", "row 2: could not convert")],
)
def test_files_that_do_not_fit_are_refused(tmp_path, text, message, capsys):
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_scored_answers([path], "prompt", "answer", "score")
    assert main([str(path), "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "scores.csv" in capsys.readouterr().err


def test_file_without_scores_is_refused(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("prompt,answer\na,b\n")
    with pytest.raises(DataError, match="no column score"):
        read_scored_answers([path], "prompt", "answer", "score")
