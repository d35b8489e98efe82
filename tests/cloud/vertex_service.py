"""Google Cloud on loopback: Vertex AI's pipeline jobs and schedules over REST, access tokens, and Cloud Storage.

A job's state is the test's to set, which runs its tasks; nothing else of Vertex AI is here.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from services import free_port
from services import service as serving

KINDS = {"pipelineJobs": "pipelineJobId", "schedules": None}
ACTIVE = {"pipelineJobs": "PIPELINE_STATE_RUNNING", "schedules": "ACTIVE"}


class VertexService:
    """What was asked of the service.

    Attributes:
        url: Its address.
        resources: Jobs and schedules by their names, as REST gives them.
        tokens: How many access tokens were issued.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.resources: dict[str, dict[str, Any]] = {}
        self.tokens = 0

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The resources of a kind: `pipelineJobs` or `schedules`."""
        return [resource for name, resource in list(self.resources.items()) if f"/{kind}/" in name]

    def create(self, parent: str, query: dict[str, list[str]], body: dict[str, Any]) -> dict[str, Any]:
        """Keeps a new resource under its name, as one that is under way."""
        kind = parent.rpartition("/")[2]
        parameter = KINDS[kind]
        identity = query[parameter][0] if parameter else str(len(self.resources) + 1)
        resource = body | {"name": f"{parent}/{identity}", "state": ACTIVE[kind]}
        self.resources[resource["name"]] = resource
        return resource


@contextmanager
def vertex_service() -> Iterator[VertexService]:
    """The service, in a thread, while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.service = VertexService(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.service  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def write_service_account(service: VertexService, project: str, path: Path) -> Path:
    """A service account's key file, made for this test, whose tokens come from the service."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {
        "type": "service_account",
        "project_id": project,
        "private_key_id": "loopback",
        "private_key": key.decode(),
        "client_email": f"trainer@{project}.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": f"{service.url}/token",
    }
    path.write_text(json.dumps(account), encoding="utf-8")
    return path


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        resource = self._service.resources.get(urlsplit(self.path).path.removeprefix("/v1/"))
        self._answer(200 if resource else 404, resource or {"error": {"code": 404, "message": self.path}})

    def do_POST(self) -> None:
        address = urlsplit(self.path)
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if address.path == "/token":
            self._service.tokens += 1
            self._answer(200, {"access_token": "loopback", "expires_in": 3600, "token_type": "Bearer"})
        elif self.headers["Authorization"] is None:
            self._answer(401, {"error": {"code": 401, "message": "no token"}})
        elif address.path.rpartition("/")[2] in KINDS:
            parent = address.path.removeprefix("/v1/")
            self._answer(200, self._service.create(parent, parse_qs(address.query), json.loads(content)))
        else:
            self._answer(404, {"error": {"code": 404, "message": self.path}})

    @property
    def _service(self) -> VertexService:
        service: VertexService = self.server.service  # type: ignore[attr-defined]
        return service

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def cloud_storage(bucket: str, log: Path) -> Iterator[dict[str, str]]:
    """Cloud Storage on loopback, with a bucket: what an environment needs to reach it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    script = (
        "from gcp_storage_emulator.server import create_server; "
        f"server = create_server('127.0.0.1', {port}, in_memory=True, default_bucket='{bucket}'); server.run()"
    )
    with serving([sys.executable, "-c", script], url, log, os.environ):
        yield {"STORAGE_EMULATOR_HOST": url, "GOOGLE_CLOUD_PROJECT": "my-project"}
