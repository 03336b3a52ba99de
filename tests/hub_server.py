"""A small Hub on the loopback: enough of its HTTP interface for the real `huggingface_hub` client to read repositories.

Repositories are folders, `root/models/org/name` and `root/datasets/org/name`; their revisions are the commit and `main`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class HubServer:
    """Serves `root`; use as a context manager. `commits[repo]` is what `main` stands for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *args) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, folder: Path) -> str:
        """A commit id that changes with the repository's content."""
        digest = hashlib.sha1()
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(folder)}".encode() + file.read_bytes())
        return digest.hexdigest()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"{request.command} {path}")
        parts = path.strip("/").split("/")
        if parts[0] == "api" and parts[1] in ("models", "datasets") and len(parts) >= 4:
            return self._api(request, self.root.joinpath(*parts[1:4]), parts[4:])
        kind, parts = ("datasets", parts[1:]) if parts[0] == "datasets" else ("models", parts)
        if len(parts) >= 5 and parts[2] == "resolve":
            return self._file(request, self.root.joinpath(kind, *parts[:2]), parts[3], "/".join(parts[4:]), body)
        return self._send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})

    def _api(self, request, folder: Path, rest: list[str]) -> None:
        if not folder.is_dir():
            return self._send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = self.commit(folder)
        if rest[:1] == ["revision"] and rest[1] not in ("main", commit):
            return self._send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": self._etag(folder / f)} for f in files
            ]
            return self._json(request, tree)
        if rest[:1] == ["paths-info"]:
            return self._json(request, [])
        info = {
            "id": "/".join(folder.parts[-2:]),
            "sha": commit,
            "private": False,
            "siblings": [{"rfilename": f} for f in files],
        }
        return self._json(request, info)

    def _file(self, request, folder: Path, revision: str, name: str, body: bool) -> None:
        if not folder.is_dir():
            return self._send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        commit = self.commit(folder)
        if revision not in ("main", commit):
            return self._send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        file = folder / name
        if not file.is_file():
            return self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"ETag": f'"{self._etag(file)}"', "X-Repo-Commit": commit}
        return self._send(request, 200, file.read_bytes(), headers, body=body)

    @staticmethod
    def _etag(file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def _json(self, request, data) -> None:
        self._send(request, 200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    @staticmethod
    def _send(request, status: int, data: bytes, headers: dict[str, str], *, body: bool = True) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            request.send_header(name, value)
        request.end_headers()
        if body and request.command != "HEAD":
            request.wfile.write(data)
