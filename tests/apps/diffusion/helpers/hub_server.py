"""A local server with the part of the hub's protocol that the upload and download of a small repository need."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: name -> path -> content."""

    repositories: dict[str, dict[str, bytes]]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            sent = json.loads(content)
            name = "/".join(filter(None, (sent.get("organization") or "me", sent["name"])))
            self.repositories.setdefault(name, {})
            self._json({"url": f"{self._address()}/{name}", "name": name})
        elif parts[-2] == "preupload":
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(content)["files"]]
            self._json({"files": files})
        elif parts[-2] == "commit":
            name = "/".join(parts[2:4])
            for line in map(json.loads, content.decode().splitlines()):
                if line["key"] == "file":
                    self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self._address()}/{name}/commit/{COMMIT}"
            self._json({"commitUrl": url, "commitOid": COMMIT, "success": True})
        else:
            self._json({"errors": [], "warnings": []})  # the check of a card's header

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api":
            name = "/".join(parts[2:4])
            if name not in self.repositories:
                return self._json({"error": "Repository not found"}, 404)
            if "tree" in parts[4:5]:
                contents = self.repositories[name].items()
                return self._json(
                    [
                        {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for path, content in contents
                    ]
                )
            files = [{"rfilename": path} for path in self.repositories[name]]
            return self._json({"id": name, "sha": COMMIT, "siblings": files, "tags": [], "private": False})
        name, path = "/".join(parts[:2]), "/".join(parts[4:])
        content = self.repositories.get(name, {}).get(path)
        if content is None:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        self._send(content, 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _json(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(answer).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """Address and repositories of a server that runs within the context."""
    repositories: dict[str, dict[str, bytes]] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Hub,), {"repositories": repositories}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", repositories
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
