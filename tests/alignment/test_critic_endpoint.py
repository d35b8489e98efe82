import logging
import socket

import pytest
from chat_server import Reply, chat_server

import ultrathink_model.alignment.critic_endpoint as module
from ultrathink_model.alignment.critic_endpoint import EndpointCritic
from ultrathink_model.config.constitutional import ConstitutionalConfig
from ultrathink_model.errors import CriticError

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)


def critic(url: str, **values) -> EndpointCritic:
    values = {"critic_retries": 2, "critic_timeout_seconds": 5, **values}
    return EndpointCritic(ConstitutionalConfig(critic="endpoint", critic_model="judge", critic_url=url, **values))


def test_asks_in_the_words_of_the_protocol(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with chat_server(lambda *_: Reply(" better. \n\nHuman: and more")) as server:
        assert critic(server.url, response_tokens=7).write(["a text"], 0) == ["better."]
    body, headers = server.requests[0]
    assert body == {
        "model": "judge",
        "messages": [{"role": "user", "content": "a text"}],
        "max_tokens": 7,
        "temperature": 0.8,
    }
    assert headers["Authorization"] == f"Bearer {KEY}"


def test_key_comes_from_the_variable_that_the_config_names(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OTHER_KEY", raising=False)
    with chat_server(lambda *_: Reply()) as server:
        critic(server.url, critic_key_variable="OTHER_KEY").write(["x"], 0)
        assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize("answer", ["B", " (B)", "The better answer is B.", "b or B"])
def test_letter_is_read_out_of_the_answer(answer):
    with chat_server(lambda *_: Reply(answer)) as server:
        assert critic(server.url).choose(["x"]) == [0.0]


@pytest.mark.parametrize("answer", ["", "Neither.", "A or B", "Apples"])
def test_answer_that_names_no_letter_is_no_choice(answer):
    with chat_server(lambda *_: Reply(answer)) as server:
        assert critic(server.url).choose(["x"]) == [None]


@pytest.mark.parametrize(
    "bad",
    [
        Reply(status=500),
        Reply(status=429),
        Reply(raw=b"<html>"),
        Reply(raw=b'{"choices": []}'),
        Reply(raw=b"[1]"),
        Reply(text=None),
    ],
)
def test_failed_request_is_sent_again(bad):
    with chat_server(lambda number, _: bad if number < 2 else Reply("done")) as server:
        assert critic(server.url).write(["x"], 0) == ["done"]
        assert len(server.requests) == 3


def test_retries_end_in_a_skip_or_an_error_as_configured():
    with chat_server(lambda *_: Reply(status=503)) as server:
        assert critic(server.url).write(["x"], 0) == [None]
        assert len(server.requests) == 3
        with pytest.raises(CriticError, match="answers 503"):
            critic(server.url, on_bad_answer="error").write(["x"], 0)


def test_server_that_is_down_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(CriticError, match=r"127\.0\.0\.1:\d+/v1/chat/completions does not answer"):
        critic(url, on_bad_answer="error").write(["x"], 0)


@pytest.mark.parametrize("slow", [Reply(delay=1.5), Reply("a long answer " * 20, drip=0.05)])
def test_slow_answer_is_not_waited_for(slow):
    with chat_server(lambda *_: slow) as server:
        settings = {"critic_timeout_seconds": 0.3, "critic_retries": 0, "on_bad_answer": "error"}
        with pytest.raises(CriticError, match="does not answer"):
            critic(server.url, **settings).write(["x"], 0)


def test_refused_request_is_not_repeated_and_says_what_to_check():
    with chat_server(lambda *_: Reply(status=401, raw=b"no such key")) as server:
        with pytest.raises(CriticError, match=r"401: no such key; check constitutional\.critic_url"):
            critic(server.url).write(["x"], 0)
        assert len(server.requests) == 1


def test_budget_ends_the_asking():
    with chat_server(lambda *_: Reply("word", tokens=40)) as server:
        limited = critic(server.url, critic_token_budget=100)
        assert limited.write(["x"] * 5, 0) == ["word"] * 3 + [None] * 2
        assert limited.tokens == 120
        assert len(server.requests) == 3


def test_tokens_are_estimated_where_the_endpoint_counts_none():
    with chat_server(lambda *_: Reply("y" * 40)) as server:
        asked = critic(server.url)
        asked.write(["x" * 80], 0)
        assert asked.tokens == 30


def test_key_stands_in_no_message(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    echo = Reply(status=500, raw=f"bad key {KEY}".encode())
    with chat_server(lambda *_: echo) as server, pytest.raises(CriticError) as error:
        critic(server.url, on_bad_answer="error").write(["x"], 0)
    text = str(error.value) + caplog.text
    assert KEY not in text
    assert "bad key ***" in text


def test_secrets_in_the_address_are_refused():
    with pytest.raises(ValueError, match="secrets come from the environment"):
        critic("http://user:password@127.0.0.1:1/v1")


def test_redirect_carries_the_key_nowhere(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with chat_server(lambda *_: Reply("stolen")) as other:
        away = Reply(status=307, headers={"Location": f"{other.url}/chat/completions"})
        with chat_server(lambda *_: away) as server, pytest.raises(CriticError, match="307"):
            critic(server.url).write(["x"], 0)
        assert not other.requests
