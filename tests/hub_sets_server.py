"""A stand-in for the Hugging Face Hub: a server of data sets that lie in a folder."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from vgan.data import celeba_mirror

COMMIT = "0123456789" * 4
REVISIONS = ("main", COMMIT, celeba_mirror.REVISION)
TOKEN = "hf_of_the_test"


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hub does. user/private needs a token, user/gated refuses its files."""

    root: Path
    log: list[str]

    def log_message(self, *_: object) -> None: ...

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        self.log.append(f"{self.command} {self.path}")
        path = unquote(urlparse(self.path).path)
        found = re.match(r"(/api)?/datasets/([^/]+/[^/]+)/?(\w*)/?([^/]*)/?(.*)", path)
        if found is None:
            return self.answer(404)
        api, repo, action, revision, rest = found.groups()
        folder = self.root / repo
        is_locked = repo == "user/private" and TOKEN not in self.headers.get("Authorization", "")
        if not folder.is_dir() or is_locked:
            return self.answer(401, X_Error_Code="RepoNotFound")
        if action and revision not in REVISIONS:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if api and action in ("", "revision"):
            return self.json({"id": repo, "sha": COMMIT, "siblings": [], "tags": []})
        if api and action == "tree":
            return self.json([self.entry(folder, p) for p in self.below(folder, folder / rest)])
        if api:
            return self.answer(404)
        file = folder / rest
        if repo == "user/gated" and rest != "README.md":
            return self.answer(403, X_Error_Code="GatedRepo")
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        self.send_file(file)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Answer which of some paths there are (paths-info)."""
        self.log.append(f"{self.command} {self.path}")
        _, repo = unquote(self.path).split("/datasets/")
        folder = self.root / "/".join(repo.split("/")[:2])
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        content = json.loads(body) if body.startswith("{") else parse_qs(body)
        paths = [folder / path for path in content["paths"]]
        self.json([self.entry(folder, path) for path in paths if path.exists()])

    def below(self, folder: Path, top: Path) -> list[Path]:
        is_recursive = "recursive=true" in self.path.lower() or "recursive=1" in self.path
        return sorted(top.rglob("*") if is_recursive else top.glob("*"))

    @staticmethod
    def entry(folder: Path, path: Path) -> dict[str, Any]:
        kind = "directory" if path.is_dir() else "file"
        size = 0 if path.is_dir() else path.stat().st_size
        name = path.relative_to(folder).as_posix()
        found = {"type": kind, "oid": "1" * 40, "size": size, "path": name}
        if path.suffix == ".parquet":
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            found["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
        return found

    def send_file(self, file: Path) -> None:
        content = file.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"ETag": etag, "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self.answer(200, content, **headers)
        start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
        self.answer(206, content[start : end + 1], **headers)


@contextlib.contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve root/user/set and so on; give the address and the list of requests."""
    handler = type("Handler", (Handler,), {"root": root, "log": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.log  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
