"""A stand-in for the Hugging Face Hub: its HTTP endpoints for models, in this process."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN, USER = "hf_right", "ada"


@dataclass
class Repo:
    """A model on the Hub. commits: the files of each, by name; refuses: an error of every read."""

    commits: list[dict[str, bytes]] = field(default_factory=list)
    private: bool = False
    refuses: tuple[int, str] | None = None


@dataclass
class Hub:
    """The server's address and repos. Commits to a repo in `locked` are forbidden."""

    url: str
    repos: dict[str, Repo] = field(default_factory=dict)
    locked: set[str] = field(default_factory=set)
    rejected_card: str = ""  # what the Hub says of every model card
    requests: list[str] = field(default_factory=list)


def sha_of(repo: str, number: int) -> str:
    return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        signed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if parts[0] == "api" and parts[1] != "models":
            self._account(parts[1], json.loads(body or b"{}"), signed)
        elif parts[0] == "api":
            self._model("/".join(parts[2:4]), parts[4:], body, signed)
        else:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _account(self, what: str, body: Any, signed: bool) -> None:
        if what == "validate-yaml":
            errors = [{"message": self.hub.rejected_card}] if self.hub.rejected_card else []
            self._send(400 if errors else 200, {"errors": errors, "warnings": []})
        elif not signed:
            self._send(401, {"error": "Invalid credentials"})
        elif what == "whoami-v2":
            self._send(200, {"name": USER})
        elif body["organization"] != USER:
            self._send(403, {"error": "You don't have the rights to create a model there"})
        else:
            name = f"{USER}/{body['name']}"
            private = body.get("private") or body.get("visibility") == "private"
            status = 409 if name in self.hub.repos else 200
            self.hub.repos.setdefault(name, Repo(private=bool(private)))
            self._send(status, {"url": f"{self.hub.url}/{name}"})

    def _find(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or repo.refuses:
            status, code = repo.refuses if repo and repo.refuses else (404, "RepoNotFound")
            self._send(status, {"error": code}, {"X-Error-Code": code})
            return None
        return repo

    def _model(self, name: str, rest: list[str], body: bytes, signed: bool) -> None:
        repo = self._find(name)
        if repo is None:
            return
        if rest[:1] == ["preupload"] or rest[:1] == ["commit"]:
            if not signed or name in self.hub.locked:
                self._send(403, {"error": "Forbidden: you must have write access"})
            elif rest[0] == "preupload":
                paths = [entry["path"] for entry in json.loads(body)["files"]]
                kept = {"uploadMode": "regular", "shouldIgnore": False}
                self._send(200, {"files": [{"path": path, **kept} for path in paths]})
            else:
                files = dict(repo.commits[-1]) if repo.commits else {}
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                repo.commits.append(files)
                oid = sha_of(name, len(repo.commits))
                self._send(200, {"commitOid": oid, "commitUrl": f"{self.hub.url}/{name}"})
            return
        names: dict[str, bytes] = repo.commits[-1] if repo.commits else {}
        information = {"id": name, "sha": sha_of(name, len(repo.commits)), "private": repo.private}
        library = "vgan" if b"\nlibrary_name: vgan\n" in names.get("README.md", b"") else None
        information |= {"siblings": [{"rfilename": file} for file in names]}
        self._send(200, {**information, "library_name": library, "tags": [], "downloads": 0})

    def _file(self, name: str, revision: str, file: str) -> None:
        repo = self._find(name)
        if repo is None:
            return
        shas = {sha_of(name, i + 1): i for i in range(len(repo.commits))}
        shas |= {"main": len(repo.commits) - 1, "v1": 0}
        if revision not in shas:
            self._send(404, {}, {"X-Error-Code": "RevisionNotFound"})
        elif file not in repo.commits[shas[revision]]:
            self._send(404, {}, {"X-Error-Code": "EntryNotFound"})
        else:
            content = repo.commits[shas[revision]][file]
            headers = {"X-Repo-Commit": sha_of(name, shas[revision] + 1)}
            headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
            self._send(200, content, headers)

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serving() -> Iterator[Hub]:
    """An empty Hub while the block lasts."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Handler.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield Handler.hub
        server.shutdown()
        thread.join()


def direct(url: str, cache: str, token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub, which read its environment when imported, use this server and cache."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", cache)
    monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", f"{cache}/no-token")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN", raising=False)
