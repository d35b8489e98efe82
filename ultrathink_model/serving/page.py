"""The page of `run.py chat --web`: a script that Streamlit runs again at every message."""

import sys
from collections.abc import Iterator

import streamlit

from ultrathink_model.errors import UltrathinkError
from ultrathink_model.serving.chat import make_conversation, make_parser
from ultrathink_model.serving.conversation import Conversation, Messages
from ultrathink_model.serving.shown import Message, Shown

PICTURE_WIDTH = 224
FILES = ["image/*", "audio/*"]


@streamlit.cache_resource(show_spinner="Loading the model…")
def load(arguments: tuple[str, ...]) -> Conversation:
    """The conversation that the command line describes, loaded once for all visitors."""
    return make_conversation(make_parser().parse_args(list(arguments)))


def texts(conversation: Conversation, messages: Messages) -> Iterator[str]:
    """The answer's text as it comes, and a note where the guard has stepped in."""
    guarded = False
    for piece in conversation.answer(messages):
        guarded = guarded or piece.guarded
        yield piece.text
    if guarded:
        yield "\n\n*The guard stepped in.*"


def show(message: Message) -> None:
    """A message with its images and sounds."""
    with streamlit.chat_message(message["role"]):
        for image in message.get("images", []):
            streamlit.image(image, width=PICTURE_WIDTH)
        for sound in message.get("audio", []):
            streamlit.audio(sound)
        streamlit.markdown(message["content"])


def ask(conversation: Conversation) -> Message | None:
    """What is said now, with the files and the recording that go with it; None where nothing is, or it cannot be read."""
    if conversation.media_options is None:
        said = streamlit.chat_input("Say something")
        return Message(role="user", content=str(said)) if said else None
    given = streamlit.chat_input("Say something", accept_file="multiple", file_type=FILES, accept_audio=True)
    if not given:
        return None
    shown = Shown(conversation.media_options)
    try:
        for file in given.files:
            shown.add("image" if file.type.startswith("image/") else "audio", file.getvalue())
        if given.audio is not None:
            shown.add("audio", given.audio.getvalue())
        return shown.message(given.text)
    except UltrathinkError as error:
        streamlit.error(str(error))
        return None


def main() -> None:
    """Shows what was said, and answers what is said now."""
    conversation = load(tuple(sys.argv[1:]))
    streamlit.title("ULTRATHINK")
    streamlit.caption(f"{conversation.folder} · {'guarded' if conversation.has_guard else 'no guard'}")
    messages = streamlit.session_state.setdefault("messages", [])
    if streamlit.button("New conversation"):
        messages.clear()
    for message in messages:
        show(message)
    said = ask(conversation)
    if said:
        messages.append(said)
        show(said)
        answer = streamlit.chat_message("assistant").write_stream(texts(conversation, messages))
        messages.append({"role": "assistant", "content": str(answer)})


if __name__ == "__main__":
    main()
