"""A small Hub on the loopback: enough for the real `huggingface_hub` client to read and write repositories.

Repositories are folders, `root/models/org/name` and `root/datasets/org/name`; their revisions are the commit and `main`. One
with a file `.private` in it is for those with a token. Uploaded LFS objects lie in `root/lfs`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class HubServer:
    """Serves `root`; use as a context manager. `commits[repo]` is what `main` stands for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[str] = []
        self.tokens: dict[str, tuple[str, set[str]]] = {}  # token: user, and the names that it may write under
        self.broken_uploads = 0  # so many uploads break off in the middle
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_POST(self) -> None:
                hub.write(self)

            def do_PUT(self) -> None:
                hub.store(self)

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
        for file in self.files(folder):
            digest.update(f"{file.relative_to(folder)}".encode() + file.read_bytes())
        return digest.hexdigest()

    @staticmethod
    def files(folder: Path) -> list[Path]:
        return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".private")

    def user(self, request) -> tuple[str, set[str]] | None:
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.tokens.get(token)

    def hidden(self, request, folder: Path) -> bool:
        return not folder.is_dir() or ((folder / ".private").exists() and self.user(request) is None)

    def write(self, request: BaseHTTPRequestHandler) -> None:
        """Create a repository, or one of a commit's steps."""
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"POST {path}")
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        user = self.user(request)
        if user is None:
            return self._send(request, 401, b'{"error": "Invalid username or password."}', {})
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = asked.get("organization") or user[0]
            if name not in user[1]:
                return self._send(request, 403, b'{"error": "no rights"}', {})
            folder = self.root / f"{asked.get('type', 'model')}s" / name / asked["name"]
            if folder.exists():
                return self._send(request, 409, b'{"error": "exists"}', {})
            folder.mkdir(parents=True)
            if asked.get("private") or asked.get("visibility") == "private":
                (folder / ".private").touch()
            return self._json(request, {"url": f"{self.endpoint}/{folder.relative_to(self.root)}"})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = []
            for o in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{self.endpoint}/lfs/{o['oid']}"}}
                objects.append(o if (self.root / "lfs" / o["oid"]).exists() else o | {"actions": upload})
            return self._json(request, {"objects": objects, "transfer": "basic"})
        if path == "/api/validate-yaml":
            return self._json(request, {"errors": [], "warnings": []})
        folder = self.root.joinpath(*parts[1:4])
        if parts[4:5] == ["paths-info"]:
            wanted = parse_qs(body.decode()).get("paths", []) if body[:1] != b"{" else json.loads(body)["paths"]
            return self._json(request, [self._entry(folder, folder / p) for p in wanted if (folder / p).exists()])
        if parts[2] not in user[1]:
            return self._send(request, 403, b'{"error": "no rights"}', {})
        if parts[4] == "preupload":
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".parquet") else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._json(request, {"files": modes})
        return self._commit(request, folder, [json.loads(line) for line in body.splitlines()])

    def _commit(self, request, folder: Path, lines: list[dict]) -> None:
        parent = lines[0]["value"].get("parentCommit")
        if parent not in (None, self.commit(folder)):
            return self._send(request, 412, b'{"error": "changed"}', {})
        for line in lines[1:]:
            value = line["value"]
            file = folder / value["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "lfsFile":
                file.write_bytes((self.root / "lfs" / value["oid"]).read_bytes())
            else:
                file.write_bytes(base64.b64decode(value["content"]))
        commit = self.commit(folder)
        url = f"{self.endpoint}/{folder.relative_to(self.root)}/commit/{commit}"
        self._json(request, {"commitUrl": url, "commitOid": commit})

    def store(self, request: BaseHTTPRequestHandler) -> None:
        """An LFS object."""
        self.requests.append(f"PUT {request.path}")
        data = request.rfile.read(int(request.headers["Content-Length"]))
        if self.broken_uploads:
            self.broken_uploads -= 1
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        oid = request.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        (self.root / "lfs").mkdir(exist_ok=True)
        (self.root / "lfs" / oid).write_bytes(data)
        self._send(request, 200, b"", {})

    def _entry(self, folder: Path, path: Path) -> dict:
        name = str(path.relative_to(folder))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": self._etag(path)}

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
        if self.hidden(request, folder):
            return self._send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = self.commit(folder)
        if rest[:1] == ["revision"] and rest[1] not in ("main", commit):
            return self._send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = [str(p.relative_to(folder)) for p in self.files(folder)]
        if rest[:1] == ["tree"]:
            under = folder.joinpath(*rest[2:])
            if not under.is_dir():
                return self._send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})
            found = (
                self.files(under) if "recursive=True" in request.path else [p for p in under.iterdir() if p.name != ".private"]
            )
            return self._json(request, [self._entry(folder, p) for p in sorted(found)])
        if rest[:1] == ["paths-info"]:
            return self._json(request, [])
        sized = "blobs" in parse_qs(urlsplit(request.path).query)
        info = {
            "id": "/".join(folder.parts[-2:]),
            "sha": commit,
            "private": (folder / ".private").exists(),
            "siblings": [{"rfilename": f} | ({"size": (folder / f).stat().st_size} if sized else {}) for f in files],
        }
        return self._json(request, info)

    def _file(self, request, folder: Path, revision: str, name: str, body: bool) -> None:
        if self.hidden(request, folder):
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
