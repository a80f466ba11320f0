"""A server that speaks the hub's calls for publishing a model, as huggingface_hub makes them, with LFS storage."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

GOOD, READ_ONLY, POWERLESS = "hf_good", "hf_read", "hf_powerless"
"""Tokens of someone in the organisation `org`. The last one is refused where it writes."""


class Hub:
    """Repositories by name: `private`, and `files` by path. calls: every request, as method and path."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.storage: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.address = ""

    def whoami(self, token: str) -> tuple[int, Any]:
        if token not in (GOOD, READ_ONLY, POWERLESS):
            return 401, {"error": "Invalid credentials in Authorization header"}
        role = "read" if token == READ_ONLY else "write"
        access = {"displayName": "test", "role": role}
        return 200, {"name": "someone", "orgs": [{"name": "org"}], "auth": {"accessToken": access}}

    def create(self, token: str, body: Any) -> tuple[int, Any]:
        name = f"{body.get('organization') or 'someone'}/{body['name']}"
        if token == POWERLESS:
            return 403, {"error": "Forbidden: you have no permission to create a model under this namespace"}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.address}/{name}"}
        is_private = body.get("visibility") == "private" or body.get("private") is True
        self.repositories[name] = {"private": is_private, "files": {".gitattributes": b""}}
        return 200, {"url": f"{self.address}/{name}", "name": name, "id": name}

    def batch(self, body: Any) -> tuple[int, Any]:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.address}/storage/{item['oid']}"}}}
            for item in body["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, name: str, lines: bytes) -> tuple[int, Any]:
        files = self.repositories[name]["files"]
        for line in map(json.loads, lines.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.storage[value["oid"]]
        return 200, {"commitUrl": f"{self.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}

    def validate(self, body: Any) -> tuple[int, Any]:
        front = yaml.safe_load(body["content"].split("---\n")[1])
        errors = [] if isinstance(front.get("base_model", ""), str) else [{"message": "base_model is no name"}]
        return (400 if errors else 200), {"errors": errors, "warnings": []}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    def do_PUT(self) -> None:
        data = self._body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.storage[oid] = data
        self._send(200, {})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, body: bytes) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.calls.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if path == "/api/whoami-v2":
            self._send(*hub.whoami(token))
        elif path == "/api/repos/create":
            self._send(*hub.create(token, json.loads(body)))
        elif path == "/api/validate-yaml":
            self._send(*hub.validate(json.loads(body)))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._send(*hub.batch(json.loads(body)))
        elif name not in hub.repositories:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif "/preupload/" in path:
            modes = {item["path"]: _mode(item["path"]) for item in json.loads(body)["files"]}
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self._send(200, {"files": files})
        elif "/commit/" in path:
            self._send(*hub.commit(name, body))
        else:
            found = hub.repositories[name]
            siblings = [{"rfilename": file} for file in found["files"]]
            self._send(200, {"id": name, "sha": "0" * 40, "private": found["private"], "siblings": siblings})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Not on the tests' standard error."""


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub at `Hub.address`, for as long as the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
