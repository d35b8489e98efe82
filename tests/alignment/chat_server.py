"""A server of the chat-completions protocol on loopback, which answers, fails and dawdles as a test tells it to."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server does with one request."""

    text: str | None = "fine"
    status: int = 200
    delay: float = 0.0
    drip: float = 0.0
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    tokens: int | None = None


@dataclass
class ChatServer:
    """A running server: its address, what it replies, and the requests that came, as body and headers."""

    url: str
    reply: Callable[[int, dict[str, Any]], Reply]
    requests: list[tuple[dict[str, Any], dict[str, str]]] = field(default_factory=list)


@contextmanager
def chat_server(reply: Callable[[int, dict[str, Any]], Reply]) -> Iterator[ChatServer]:
    """Serves `reply(number of the request, its body)`."""
    running = ChatServer("", reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            running.requests.append((body, dict(self.headers)))
            assert self.path == "/v1/chat/completions"
            done = running.reply(len(running.requests) - 1, body)
            time.sleep(done.delay)
            answer: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": done.text}}]}
            if done.tokens is not None:
                answer["usage"] = {"total_tokens": done.tokens}
            content = done.raw if done.raw is not None else json.dumps(answer).encode()
            try:
                self.send_response(done.status)
                for name, value in done.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                for start in range(0, len(content), 8 if done.drip else max(1, len(content))):
                    self.wfile.write(content[start : start + (8 if done.drip else len(content))])
                    self.wfile.flush()
                    time.sleep(done.drip)
            except OSError:
                pass  # the client has left

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    running.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()
