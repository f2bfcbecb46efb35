"""A hub on loopback: HTTP as huggingface_hub speaks it, from files in memory, with faults that tests switch on.

Large files are served like the real hub does it, by a redirect to another host; each request is recorded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from mq_quant.formats.checkpoint.streamed import HEADER_GUESS

REPO = "acme/small-m2"
MAIN = "1" * 40


@dataclass
class Fault:
    """What happens to answers about files whose name contains `match`, the next `times` times.

    kind: "status" answers `value`; "cut" closes the connection after `value` bytes of the body; "flip" changes the byte
    at `value`; "long" appends bytes and says so; "short" leaves the last ones out and says so; "commit" claims another
    revision; "drip" sends headers without end; "hook" calls `call` before anything is sent; "answer" sends what
    `answer` makes of the request.
    """

    kind: str
    match: str
    times: int = 1
    value: int = 0
    call: Callable[[], None] = lambda: None
    answer: Callable[[str | None, bytes], Answer] = lambda *_: Answer()
    """From the request's Range and the file's bytes."""


@dataclass
class Answer:
    """An answer as it goes over the wire; with `cut`, the connection is closed after that many bytes of the body.

    A Content-Length is added unless the headers have one; where theirs is empty, none is sent.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    token: str | None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class HubServer:
    """Repositories as {name: {commit: {file name: bytes}}}; `faults` and `bytes_per_second` may change at any time."""

    repositories: dict[str, dict[str, dict[str, bytes]]]
    token: str | None = None
    bytes_per_second: float | None = None
    page: int | None = None
    """Files on a page of the long list; the short one then lacks sizes and hashes, as those of some mirrors do."""
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    endpoint: str = ""
    storage: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take_fault(self, name: str, *kinds: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.kind in kinds and fault.match in name and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def sent(self, name: str) -> int:
        """How many answers about the body of a large file were asked for."""
        return sum(r.path.startswith("/storage/") and r.path.endswith(name) for r in self.requests)


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf", ".gguf_file"))


@functools.lru_cache
def sibling(name: str, data: bytes) -> Mapping[str, Any]:
    """What the hub states of a file; kept, since the benchmark's files are large and a hub hashes them once."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    out: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
    if is_large(name):
        out["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return out


def information(repo: str, commit: str, files: dict[str, bytes]) -> bytes:
    siblings = [sibling(name, data) for name, data in files.items()]
    content = {"id": repo, "sha": commit, "siblings": siblings, "tags": [], "private": False}
    return json.dumps(content).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer

    def log_message(self, *args: object) -> None:
        """Keep the tests' output clean."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        self.hub.requests.append(
            Request(self.command, path, self.headers.get("Range"), token, dict(self.headers))
        )
        routes = (
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", self.tree),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>.+))?", self.info),
            (r"/storage/(?P<repo>[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<name>.+)", self.body),
            (r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)", self.resolve),
        )
        found = [(m.groupdict(), route) for pattern, route in routes if (m := re.fullmatch(pattern, path))]
        if not found:
            self.empty(404)
            return
        parts, route = found[0]
        if fault := self.hub.take_fault(path, "hook"):
            fault.call()
        if self.hub.take_fault(path, "drip"):
            self.drip()
            return
        if fault := self.hub.take_fault(path, "status"):
            self.empty(fault.value, {"Retry-After": "0"})
            return
        if self.hub.token and not path.startswith("/storage/") and token != f"Bearer {self.hub.token}":
            self.empty(401, {"X-Error-Code": "RepoNotFound"})
            return
        commits = self.hub.repositories.get(parts["repo"])
        if commits is None:
            self.empty(404, {"X-Error-Code": "RepoNotFound"})
            return
        commit = parts.get("revision") or "main"
        commit = next(iter(commits)) if commit == "main" else commit
        if commit not in commits:
            self.empty(404, {"X-Error-Code": "RevisionNotFound"})
            return
        name = parts.get("name", "")
        if name and name not in commits[commit]:
            self.empty(404, {"X-Error-Code": "EntryNotFound"})
            return
        if fault := self.hub.take_fault(path, "answer"):
            self.reply(fault.answer(self.headers.get("Range"), commits[commit].get(name, b"")))
            return
        route(parts["repo"], commit, name, commits[commit])

    def drip(self) -> None:
        self.close_connection = True
        try:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for _ in range(1000):
                self.wfile.write(b"X-More: x\r\n")
                threading.Event().wait(0.01)
        except OSError:  # the client went away
            return

    def reply(self, answer: Answer) -> None:
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(answer.body)), **answer.headers}
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.write(answer.body[: answer.cut])
        if answer.cut is not None or not headers["Content-Length"]:
            self.close_connection = True

    def empty(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()

    def info(self, repo: str, commit: str, _: str, files: dict[str, bytes]) -> None:
        content = information(repo, commit, files)
        if self.hub.page is not None:
            siblings = [{"rfilename": name} for name in files]
            content = json.dumps({**json.loads(content), "siblings": siblings}).encode()
        self.send(content, {"Content-Type": "application/json"}, repo)

    def tree(self, repo: str, commit: str, _: str, files: dict[str, bytes]) -> None:
        entries = [{"type": "directory", "path": "folder", "size": 0, "oid": "d" * 40}]
        for name, data in files.items():
            entry = dict(sibling(name, data))
            entry |= {"type": "file", "path": entry.pop("rfilename"), "oid": entry.pop("blobId")}
            if "lfs" in entry:
                entry["lfs"] = {"size": len(data), "oid": entry["lfs"]["sha256"]}
            entries.append(entry)
        size, at = (
            self.hub.page or len(entries),
            int(dict(parse_qsl(urlsplit(self.path).query)).get("cursor", 0)),
        )
        url = f"{self.hub.endpoint}/api/models/{repo}/tree/{commit}?recursive=true&cursor="
        links = [f'<{url}{at + size}>; rel="next"'] if at + size < len(entries) else []
        headers = {"Link": ", ".join([f'<{url}0>; rel="first"', *links]), "Content-Type": "application/json"}
        self.send(json.dumps(entries[at : at + size]).encode(), headers, repo)

    def resolve(self, repo: str, commit: str, name: str, files: dict[str, bytes]) -> None:
        entry = sibling(name, files[name])
        headers = {
            "X-Repo-Commit": "f" * 40 if self.hub.take_fault(name, "commit") else commit,
            "ETag": f'"{entry["blobId"]}"',
        }
        if "lfs" in entry:
            headers |= {
                "X-Linked-Size": str(entry["size"]),
                "X-Linked-ETag": f'"{entry["lfs"]["sha256"]}"',
                "Location": f"{self.hub.storage}/storage/{repo}/{commit}/{name}",
            }
            self.empty(302, headers)
        else:
            self.send(files[name], headers, name)

    def body(self, repo: str, commit: str, name: str, files: dict[str, bytes]) -> None:
        self.send(files[name], {"ETag": '"storage"'}, name)

    def send(self, data: bytes, headers: dict[str, str], name: str) -> None:
        headers = {**headers, "Accept-Ranges": "bytes"}
        whole, status = len(data), 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(match[1]), min(int(match[2] or whole - 1) + 1, whole)
            data, status = data[start:stop], 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{whole}"
        cut = None
        if self.command == "GET" and (fault := self.hub.take_fault(name, "cut", "flip", "long", "short")):
            if fault.kind == "cut":
                cut = fault.value
            elif fault.kind == "flip":
                data = data[: fault.value] + bytes([data[fault.value] ^ 1]) + data[fault.value + 1 :]
            else:
                data = data + b"more" if fault.kind == "long" else data[:-4]
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.write(data if cut is None else data[:cut])
        if cut is not None:
            self.close_connection = True

    def write(self, data: bytes) -> None:
        """Send a body, throttled against the clock, so that a late wake-up is caught up with."""
        rate, begun = self.hub.bytes_per_second, time.monotonic()
        step = len(data) if rate is None else int(rate / 50)
        try:
            for at in range(0, len(data), max(step, 1)):
                self.wfile.write(data[at : at + step])
                if rate is not None:
                    threading.Event().wait(max(0.0, begun + (at + step) / rate - time.monotonic()))
        except OSError:  # the client went away
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients go away in the middle of answers: that is what is tested."""


@contextmanager
def serve(repositories: dict[str, dict[str, dict[str, bytes]]], **options: Any) -> Iterator[HubServer]:
    """Run a hub on a free port of the loopback interface for as long as the block lasts."""
    hub = HubServer(repositories, **options)
    with running(type("Handler", (_Handler,), {"hub": hub})) as port:
        hub.endpoint, hub.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        yield hub


@contextmanager
def running(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """Answer requests on a free port of the loopback interface for as long as the block lasts."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def repository(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint folder, as a repository's content."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def served_bytes(hub: HubServer, name: str) -> int:
    """Bytes of one large file that the hub was asked for."""
    size, total = len(hub.repositories[REPO][MAIN][name]), 0
    for request in hub.requests:
        if request.path.startswith("/storage/") and request.path.endswith(name) and request.method == "GET":
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.range or "bytes=0-")
            assert match is not None
            total += min(int(match[2] or size - 1) + 1, size) - int(match[1])
    return total


def check_each_shard_was_fetched_once(hub: HubServer) -> None:
    """Every shard, and besides it no more than what is read of a header."""
    for name, data in hub.repositories[REPO][MAIN].items():
        if name.endswith(".safetensors"):
            assert len(data) <= served_bytes(hub, name) <= len(data) + HEADER_GUESS < 2 * len(data)
