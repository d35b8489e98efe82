"""`run.py chat`: a conversation with a model, in the terminal or on a page of its own."""

import argparse
import os
import sys
from pathlib import Path

from ultrathink_model.command_line import ArgumentParser
from ultrathink_model.errors import ConfigError, UltrathinkError
from ultrathink_model.export.extras import require_all
from ultrathink_model.media.placeholders import Kind
from ultrathink_model.serving.conversation import Conversation, Sampling
from ultrathink_model.serving.guard_flags import add_guard_flags, guard_threshold
from ultrathink_model.serving.model_choice import find_model
from ultrathink_model.serving.shown import Message, Shown

PAGE = Path(__file__).resolve().with_name("page.py")
ADDRESS = "127.0.0.1"
HELP = "Say something; /new begins another conversation, /quit ends."
MEDIA_HELP = "/image PATH and /sound PATH go with what you say next."
COMMANDS: dict[str, Kind] = {"/image": "image", "/sound": "audio"}


def make_parser() -> argparse.ArgumentParser:
    """The flags of `run.py chat`."""
    parser = ArgumentParser(prog="run.py chat", description=__doc__ or "")
    model = "a model's or a run's folder; the model of the run that finished last, by default"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=model)
    parser.add_argument("--web", action="store_true", help=f"a page on {ADDRESS} in place of the terminal")
    parser.add_argument("--port", type=int, default=8501, metavar="N", help="of the page (8501)")
    add_sampling_flags(parser)
    return parser


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `make_conversation` reads."""
    usual = Sampling()
    parser.add_argument(
        "--max-new-tokens", type=int, default=usual.max_new_tokens, metavar="N", help="of an answer (256)"
    )
    parser.add_argument("--temperature", type=float, default=usual.temperature, metavar="T", help="0 is greedy (0.8)")
    parser.add_argument("--top-p", type=float, default=usual.top_p, metavar="P", help="mass that is drawn from (0.95)")
    parser.add_argument("--seed", type=int, metavar="N", help="makes answers repeatable")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, cuda:1, …")
    add_guard_flags(parser)


def make_conversation(given: argparse.Namespace) -> Conversation:
    """The conversation that the flags describe.

    Raises:
        ConfigError: A flag has a value that cannot be.
        CheckpointError: There is no such model.
    """
    checks = {
        "--max-new-tokens": (given.max_new_tokens, given.max_new_tokens >= 1, "at least 1"),
        "--temperature": (given.temperature, given.temperature >= 0, "0 or more"),
        "--top-p": (given.top_p, 0 < given.top_p <= 1, "above 0 and at most 1"),
    }
    for flag, (value, holds, rule) in checks.items():
        if not holds:
            raise ConfigError(f"{flag} {value} must be {rule}.")
    threshold = guard_threshold(given)
    sampling = Sampling(given.max_new_tokens, given.temperature, given.top_p, given.seed)
    return Conversation(find_model(given.model), sampling, threshold, given.device)


def main(arguments: list[str]) -> None:
    """Talks until the input ends.

    Raises:
        ConfigError: A flag has a value that cannot be.
        CheckpointError: There is no such model.
        DependencyError: The page needs a package that is not installed.
    """
    given = make_parser().parse_args(arguments)
    if given.web:
        _open_page(given, arguments)
    conversation = make_conversation(given)
    guard = "the guard is on" if conversation.has_guard else "there is no guard"
    print(f"{conversation.folder}: {guard}. {HELP}{f' {MEDIA_HELP}' if conversation.media_options else ''}", flush=True)
    talk(conversation)


def talk(conversation: Conversation) -> None:
    """Reads a line, streams the answer, and so on."""
    messages: list[Message] = []
    shown = Shown(conversation.media_options)
    while (line := _read_line()) is not None:
        command, _, rest = line.partition(" ")
        try:
            if line == "/new":
                messages.clear()
                shown = Shown(conversation.media_options)
            elif line == "/quit":
                return
            elif command in COMMANDS:
                shown.add(COMMANDS[command], Path(rest.strip().strip("'\"")).expanduser())
            elif line:
                messages.append(shown.message(line))
                messages.append({"role": "assistant", "content": _stream(conversation, messages)})
        except UltrathinkError as error:
            print(error)


def _read_line() -> str | None:
    try:
        return input("you> ").strip()
    except EOFError:
        print()
        return None


def _stream(conversation: Conversation, messages: list[Message]) -> str:
    """Prints an answer as it comes; Ctrl-C cuts it short."""
    print("model>", end="", flush=True)
    said, guarded = "", False
    try:
        for piece in conversation.answer(messages):
            guarded = guarded or piece.guarded
            said += piece.text
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" …", end="")
    print("\n[the guard stepped in]" if guarded else "", flush=True)
    return said.strip()


def _open_page(given: argparse.Namespace, arguments: list[str]) -> None:
    """Becomes the page's server.

    Raises:
        CheckpointError: There is no such model.
        DependencyError: Streamlit is not installed.
    """
    require_all(["streamlit"], "serve")
    folder = find_model(given.model)
    print(f"{folder}: http://{ADDRESS}:{given.port} (Ctrl-C ends)", flush=True)
    options = {
        "server.address": ADDRESS,
        "server.port": given.port,
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", *flags, str(PAGE), "--", *arguments])
