import pytest
import torch

from ultrathink_model.errors import CheckpointError, ConfigError
from ultrathink_model.models.hf import load_model, save_model
from ultrathink_model.serving import chat
from ultrathink_model.serving.conversation import REFUSAL, Conversation, Piece, Sampling, cut_at
from ultrathink_model.serving.model_choice import find_model, newest_model

GREEDY = Sampling(max_new_tokens=6, temperature=0.0)
ASKED = [{"role": "user", "content": "The state?"}]


def words(pieces):
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize(
    ("pieces", "kept"),
    [
        (["Good", " day.", "\nHum", "an: and", " you"], "Good day."),
        (["Good\nHumans", " are"], "Good\nHumans are"),
        (["ends in \nHuman"], "ends in \nHuman"),
        (["\nHuman:"], ""),
        (["two\nAssistant: a\nHuman: b"], "two"),
    ],
)
def test_answer_ends_where_the_model_speaks_for_somebody_else(pieces, kept):
    found = cut_at([Piece(text) for text in pieces], ["\nHuman:", "\nAssistant:"])
    assert words(found) == kept


def test_nothing_that_may_be_a_mark_is_shown_before_it_is_known():
    shown = [piece.text for piece in cut_at([Piece("a\nHum"), Piece("an"), Piece("kind")], ["\nHuman:"])]
    assert shown == ["a", "\nHumankind"]


def test_greedy_answers_repeat_and_long_conversations_are_shortened(finished_run):
    conversation = Conversation(finished_run("run") / "final_model", GREEDY)
    assert words(conversation.answer(ASKED)) == words(conversation.answer(ASKED))
    long = [{"role": role, "content": "The state of the union. " * 9} for role in ("user", "assistant", "user")]
    assert isinstance(words(conversation.answer(long)), str)
    assert not conversation.has_guard


def test_seed_decides_the_draws(finished_run):
    folder = finished_run("run") / "final_model"
    drawn = [words(Conversation(folder, Sampling(8, 1.0, 1.0, seed)).answer(ASKED)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_guard_takes_the_word_from_a_harmful_answer_and_can_be_left_out(finished_run, tmp_path):
    run = finished_run("run", "advanced.enable_constitutional=true", "model.max_seq_length=128")
    model = load_model(run / "final_model")
    torch.nn.init.constant_(model.harm_head.bias, 9.0)
    save_model(model, run / "final_model", tmp_path / "harmful")
    sampling = Sampling(max_new_tokens=60, temperature=0.0)
    pieces = list(Conversation(tmp_path / "harmful", sampling).answer(ASKED))
    assert words(pieces) == REFUSAL
    assert all(piece.guarded for piece in pieces)
    unguarded = Conversation(tmp_path / "harmful", sampling, guard_threshold=None)
    assert words(unguarded.answer(ASKED)) != REFUSAL


def test_newest_finished_run_is_the_default_model(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no run"):
        find_model(None)
    finished_run("first")
    second = finished_run("second")
    assert newest_model(tmp_path / "outputs") == second / "final_model"
    assert find_model(str(second)) == second / "final_model"
    assert find_model(None).resolve() == second / "final_model"
    with pytest.raises(CheckpointError, match="holds no model"):
        find_model(str(tmp_path / "outputs"))


def test_terminal_streams_answers_to_lines(finished_run, monkeypatch, capsys):
    folder = finished_run("run") / "final_model"
    lines = iter(["The state?", "", "/new", "The state?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat.main([str(folder), "--temperature", "0", "--max-new-tokens", "4", "--seed", "0"])
    answers = capsys.readouterr().out.split("model>")[1:]
    assert len(answers) == 2
    assert answers[0].strip() == answers[1].strip()


@pytest.mark.parametrize(
    "flags", [["--temperature", "-1"], ["--top-p", "0"], ["--guard", "2"], ["--max-new-tokens", "0"]]
)
def test_flags_that_cannot_be_are_refused(flags):
    with pytest.raises(ConfigError, match=flags[0]):
        chat.main(flags)


# Importing Streamlit takes most of the time.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_page_answers_what_is_said(finished_run, monkeypatch):
    testing = pytest.importorskip("streamlit.testing.v1")
    folder = finished_run("run") / "final_model"
    monkeypatch.setattr(
        "sys.argv", [str(chat.PAGE), str(folder), "--temperature", "0", "--max-new-tokens", "4", "--web"]
    )
    page = testing.AppTest.from_file(str(chat.PAGE), default_timeout=120).run()
    assert not page.exception
    page.chat_input[0].set_value("The state?").run()
    assert not page.exception
    assert [message.name for message in page.chat_message] == ["user", "assistant"]
    assert page.chat_message[0].markdown[0].value == "The state?"
