"""Conversations in which images and sounds are shown."""

from types import SimpleNamespace

import pytest
import torch
from media_rows import media_config, png, wav, write_rows

from ultrathink_model.data.prepare import prepare_data
from ultrathink_model.errors import ConfigError, MediaError
from ultrathink_model.media.image import load_image, normalise_image
from ultrathink_model.models.hf import save_model
from ultrathink_model.models.transformer import build_model
from ultrathink_model.serving import chat
from ultrathink_model.serving.conversation import Conversation, Sampling
from ultrathink_model.serving.shown import Shown

GREEDY = Sampling(max_new_tokens=12, temperature=0.0)


@pytest.fixture
def folder(tmp_path):
    data = write_rows(tmp_path / "rows")
    overrides = ["model.max_seq_length=128", "model.initializer_range=0.5", f"data.dataset={data}"]
    config = media_config(tmp_path, *overrides)
    save_model(build_model(config), prepare_data(config).tokenizer_folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def conversation(folder):
    return Conversation(folder, GREEDY)


def said(conversation, text, images=(), audio=()):
    shown = Shown(conversation.media_options)
    for kind, sources in (("image", images), ("audio", audio)):
        for source in sources:
            shown.add(kind, source)
    return shown.message(text)


def answer(conversation, *messages):
    return "".join(piece.text for piece in conversation.answer(messages))


def test_a_medium_takes_the_place_of_its_placeholder(conversation):
    message = said(conversation, "look: <image> and listen", [png(3)], [wav(4)])
    assert message["content"] == "<audio> look: <image> and listen"
    tokens, media = conversation._read([message])
    image, audio = conversation._tokenizer.convert_tokens_to_ids(["<image>", "<audio>"])
    # 16 patches; 0.4 s of sound are 5 tokens of 80 ms.
    assert (tokens == image).sum() == 16
    assert (tokens == audio).sum() == 5
    assert media.image_slots[tokens == image].tolist() == list(range(16))
    assert media.audio_slots[tokens == audio].tolist() == list(range(5))
    options = conversation.media_options
    assert torch.equal(media.images[0], torch.from_numpy(normalise_image(load_image(png(3), options), options)))


def test_the_answer_depends_on_what_is_shown(conversation):
    answers = {answer(conversation, said(conversation, "what?", [png(number)])) for number in (0, 90, 180)}
    assert len(answers) > 1
    again = [answer(conversation, said(conversation, "what?", [png(0)], [wav(1)])) for _ in range(2)]
    assert again[0] == again[1]


def test_a_long_conversation_loses_its_oldest_media(conversation):
    old = said(conversation, "word " * 30, [png(1), png(2)])
    new = said(conversation, "word " * 30, [png(3)])
    tokens, media = conversation._prompt([old, {"role": "assistant", "content": "yes"}, new], 110)
    assert media.images.shape[0] == 1
    assert media.image_slots.shape == tokens.shape
    # Of a single message that is too long the beginning is cut, and with it some of an image's tokens.
    tokens, media = conversation._prompt([said(conversation, "so?", [png(3), png(4)])], 24)
    assert tokens.shape == media.image_slots.shape == (1, 24)
    assert media.image_slots.max() == 31


def test_the_terminal_shows_what_is_named_and_goes_on_after_a_mistake(conversation, tmp_path, monkeypatch, capsys):
    (tmp_path / "a picture.png").write_bytes(png(5))
    (tmp_path / "text.wav").write_text("no sound")
    lines = [
        f"/image '{tmp_path / 'a picture.png'}'",
        "what is it?",
        "/sound nowhere.wav",
        f"/sound {tmp_path / 'text.wav'}",
        "and <image>?",
        "and now?",
        "/quit",
    ]
    monkeypatch.setattr("builtins.input", lambda _prompt: lines.pop(0))
    asked = []
    monkeypatch.setattr(
        Conversation, "answer", lambda _self, messages: iter(asked.append([dict(m) for m in messages]) or ())
    )
    chat.talk(conversation)
    printed = capsys.readouterr().out
    assert "nowhere.wav is not there" in printed
    assert "text.wav" in printed
    assert "the message has 1 times <image>, and 0 of that kind go with it" in printed
    assert [messages[-1]["content"] for messages in asked] == ["<image> what is it?", "and now?"]
    assert [len(messages[-1]["images"]) for messages in asked] == [1, 0]


def test_nothing_can_be_shown_to_a_model_of_text(finished_run):
    conversation = Conversation(finished_run("run") / "final_model", GREEDY)
    with pytest.raises(ConfigError, match=r"takes text alone.*advanced\.enable_multimodal=true"):
        said(conversation, "what?", [png(0)])
    assert said(conversation, "an <image> in words") == {"role": "user", "content": "an <image> in words"}


# Importing Streamlit takes most of the time.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_page_takes_files_and_a_recording(conversation, folder, monkeypatch):
    testing = pytest.importorskip("streamlit.testing.v1")
    from ultrathink_model.serving import page

    picture = SimpleNamespace(type="image/png", getvalue=lambda: png(7))
    recording = SimpleNamespace(type="audio/wav", getvalue=lambda: wav(2))
    given = SimpleNamespace(text="what?", files=[picture], audio=recording)
    monkeypatch.setattr(page.streamlit, "chat_input", lambda *_, **__: given)
    assert page.ask(conversation) == said(conversation, "what?", [png(7)], [wav(2)])
    errors = []
    monkeypatch.setattr(page.streamlit, "error", errors.append)
    given.files = [SimpleNamespace(type="image/png", getvalue=lambda: b"no picture")]
    assert page.ask(conversation) is None
    assert "image can be read as" in errors[0]
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", [str(chat.PAGE), str(folder), "--temperature", "0", "--max-new-tokens", "4"])
    whole = testing.AppTest.from_file(str(chat.PAGE), default_timeout=120)
    whole.session_state["messages"] = [said(conversation, "what?", [png(7)], [wav(2)])]
    assert not whole.run().exception
    assert whole.chat_message[0].markdown[0].value == "<image> <audio> what?"


def test_a_medium_that_cannot_be_read_is_refused_at_once(conversation):
    with pytest.raises(MediaError, match="medium has bytes"):
        said(conversation, "what?", [b""])
