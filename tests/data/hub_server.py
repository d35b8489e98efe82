"""A Hugging Face hub on this machine: as much of its HTTP interface as reading datasets takes.

Started as `python hub_server.py FOLDER`, where FOLDER/<owner>/<name>/ holds each dataset's files; prints its address.
The names of the files whose bytes were asked for are added to FOLDER.log.
"""

import hashlib
import http.server
import json
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
ROOT = Path(sys.argv[1])


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        path = unquote(urlsplit(self.path).path)
        for pattern, answer in (
            (r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.send_file),
            (r"/api/datasets/([^/]+/[^/]+)/paths-info/.+", lambda name: self.send_paths(name, body)),
            (r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+/?(.*)", self.send_tree),
            (r"/api/datasets/([^/]+/[^/]+)(?:/revision/.+)?", self.send_info),
        ):
            match = re.fullmatch(pattern, path)
            if match:
                return answer(*match.groups())
        return self.send(404, b"")

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.do_GET()

    def send_info(self, name):
        if not (ROOT / name).is_dir():
            return self.send(401, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": entry["path"]} for entry in entries(name, "") if entry["type"] == "file"]
        return self.send_json(
            {"id": name, "_id": "1", "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}
        )

    def send_tree(self, name, below):
        if not (ROOT / name / below).is_dir():
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        deep = "recursive=true" in self.path.lower()
        depth = below.count("/") + 1 if below else 0
        return self.send_json([entry for entry in entries(name, below) if deep or entry["path"].count("/") == depth])

    def send_paths(self, name, body):
        wanted = (
            json.loads(body)["paths"] if body.startswith(b"{") else re.findall(r"paths=([^&]+)", unquote(body.decode()))
        )
        return self.send_json([entry for entry in entries(name, "") if entry["path"] in wanted])

    def send_file(self, name, path):
        file = ROOT / name / path
        if not file.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        data = file.read_bytes()
        if self.command == "GET":
            with ROOT.with_suffix(".log").open("a") as log:
                log.write(f"{file.name}\n")
        headers = {"ETag": f'"{oid(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span:
            first, last = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.send(206, data[first : last + 1], headers)
        return self.send(200, data, headers)

    def send_json(self, value):
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status, data, headers=None):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def entries(name, below):
    root = ROOT / name
    for path in sorted((root / below).rglob("*")):
        place = path.relative_to(root).as_posix()
        if path.is_dir():
            yield {"type": "directory", "path": place, "oid": "0" * 40, "size": 0}
        else:
            yield {"type": "file", "path": place, "oid": oid(path), "size": path.stat().st_size}


def oid(file):
    return hashlib.sha1(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()
