"""The page of `run.py chat --web`: a script that Streamlit runs again at every message."""

import sys
from collections.abc import Iterator

import streamlit

from ultrathink_model.serving.chat import make_conversation, make_parser
from ultrathink_model.serving.conversation import Conversation, Messages


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


def main() -> None:
    """Shows what was said, and answers what is said now."""
    conversation = load(tuple(sys.argv[1:]))
    streamlit.title("ULTRATHINK")
    streamlit.caption(f"{conversation.folder} · {'guarded' if conversation.has_guard else 'no guard'}")
    messages = streamlit.session_state.setdefault("messages", [])
    if streamlit.button("New conversation"):
        messages.clear()
    for message in messages:
        streamlit.chat_message(message["role"]).markdown(message["content"])
    said = streamlit.chat_input("Say something")
    if said:
        messages.append({"role": "user", "content": said})
        streamlit.chat_message("user").markdown(said)
        answer = streamlit.chat_message("assistant").write_stream(texts(conversation, messages))
        messages.append({"role": "assistant", "content": str(answer)})


if __name__ == "__main__":
    main()
