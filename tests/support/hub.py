"""A small hub on this machine, and its local cache, in the forms in which huggingface_hub knows them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_of_this_test"
"""The token that may read gated repositories."""


@dataclass(frozen=True)
class Repo:
    """A repository with one commit, to which `main` and `tag` point.

    Attributes:
        large: Files that the hub stores by their SHA-256, as it does with weights.
    """

    name: str
    files: Mapping[str, bytes]
    kind: str = "model"
    gated: bool = False
    tags: tuple[str, ...] = ("main",)

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def is_large(self, name: str) -> bool:
        return name.endswith((".safetensors", ".parquet", ".bin"))

    def blob(self, name: str) -> str:
        """The name of a file's blob: its SHA-256 where it is large, else what git calls it."""
        content = self.files[name]
        if self.is_large(name):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder, as those of a repository."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put_into_cache(repo: Repo, cache: Path, only: tuple[str, ...] | None = None) -> Path:
    """Write a repository as the hub's local cache holds it. Returns the folder of the commit.

    Args:
        cache: HF_HUB_CACHE.
        only: Files that were downloaded; None for all.
    """
    root = cache / f"{repo.kind}s--{repo.name.replace('/', '--')}"
    folder = root / "snapshots" / repo.commit
    for name, content in repo.files.items():
        if only is not None and name not in only:
            continue
        blob = root / "blobs" / repo.blob(name)
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    for tag in repo.tags:
        ref = root / "refs" / tag
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(repo.commit)
    return folder


@dataclass
class Hub:
    """A hub that serves repositories, and keeps what it was asked for.

    Attributes:
        requests: Method and path of every request.
    """

    repos: list[Repo]
    requests: list[str] = field(default_factory=list)
    url: str = ""

    @property
    def fetched(self) -> set[str]:
        """The names of the files whose content was sent."""
        return {
            path.partition("/resolve/")[2].partition("/")[2]
            for method, _, path in (request.partition(" ") for request in self.requests)
            if method == "GET" and "/resolve/" in path
        }

    def answer(self, method: str, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        api = path.startswith("/api/")
        rest = path.removeprefix("/api/")[1 if not api else 0 :]
        kind = "dataset" if rest.startswith("datasets/") else "model"
        rest = rest.removeprefix("datasets/").removeprefix("models/")
        repo = next((repo for repo in self.repos if repo.kind == kind and f"{rest}/".startswith(f"{repo.name}/")), None)
        if repo is None:
            return 401, {"X-Error-Code": "RepoNotFound"}, b'{"error": "Repository not found"}'
        what, _, rest = rest[len(repo.name) :].strip("/").partition("/")
        revision, name = map(unquote, rest.partition("/")[::2])
        if what and revision not in (*repo.tags, repo.commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b'{"error": "Invalid rev id"}'
        if what in ("", "revision"):
            about = {"id": repo.name, "sha": repo.commit, "private": False, "siblings": [], "tags": []}
            return 200, {}, json.dumps(about).encode()
        if what == "tree":
            return 200, {}, json.dumps([_listed(repo, file) for file in repo.files]).encode()
        if repo.gated and token != f"Bearer {TOKEN}":
            return 403, {"X-Error-Code": "GatedRepo"}, b'{"error": "Access to this repository is restricted."}'
        if what != "resolve" or name not in repo.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{repo.blob(name)}"'}
        return 200, headers, repo.files[name]


def _listed(repo: Repo, name: str) -> dict[str, Any]:
    size = len(repo.files[name])
    entry: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(name.encode()).hexdigest()}
    if repo.is_large(name):
        entry["lfs"] = {"oid": repo.blob(name), "size": size, "pointerSize": 130}
    return entry


@contextlib.contextmanager
def serve(*repos: Repo) -> Iterator[Hub]:
    """Serve repositories on a free port of this machine."""
    hub = Hub(list(repos))

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            path = urlsplit(self.path).path  # still quoted: a revision may hold a slash
            hub.requests.append(f"{self.command} {path}")
            status, headers, body = hub.answer(self.command, path, self.headers.get("Authorization"))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = respond

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def environment(home: Path, hub: Hub | None = None, **others: str) -> dict[str, str]:
    """Variables for a program with a cache of its own, which may ask that hub, or none."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    given = {
        "HF_HOME": str(home / "hf"),
        "TGDPO_CACHE": str(home / "tgdpo"),
        "HF_HUB_OFFLINE": "0" if hub else "1",
        "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9",
        "OMP_NUM_THREADS": "1",
    }
    return inherited | given | others


def run(*command: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `python -m …` or `python -c …` from the root of the repository."""
    return subprocess.run(
        [sys.executable, *command], env=dict(env), cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
