"""A hub on loopback that takes uploads: repositories are made, large files are put to a storage, commits add both.

It speaks what huggingface_hub speaks without Xet: preupload, the batch API of Git LFS with parts, and commits as lines
of JSON. What arrives is held against the hash that it was announced with. Faults are those of `hub_server`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import hub_server
from hub_server import Answer, HubServer, Request


@dataclass
class PublishServer(HubServer):
    """`repositories` holds the files of the last commit under "main"; `private` says which are private."""

    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """What the storage holds, by SHA-256: also what no commit names yet."""
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)
    """The names that each commit added."""
    received: list[str] = field(default_factory=list)
    """The name, or the hash, of every file whose bytes were sent."""
    part_bytes: int | None = None
    """Where it is set, larger files are taken in parts of this size."""
    large: int = 100_000


class _Handler(hub_server._Handler):
    hub: PublishServer

    def do_POST(self) -> None:  # noqa: N802
        self.take()

    def do_PUT(self) -> None:  # noqa: N802
        self.take()

    def info(self, repo: str, commit: str, _: str, files: dict[str, bytes]) -> None:
        siblings: list[dict[str, Any]] = []
        for name, data in files.items():
            entry = dict(hub_server.sibling(name, data))
            if len(data) > self.hub.large:
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        content = {
            "id": repo, "sha": "1" * 40, "siblings": siblings, "tags": [], "private": self.hub.private[repo],
        }  # fmt: skip
        self.send(json.dumps(content).encode(), {"Content-Type": "application/json"}, repo)

    def take(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token, size = self.headers.get("Authorization"), int(self.headers.get("Content-Length", 0))
        fault = self.hub.take_fault(path, "cut")
        if fault:  # the connection goes while the body is on its way
            self.rfile.read(min(size, fault.value))
            self.close_connection = True
            return
        body = self.read_body(size)
        self.hub.requests.append(Request(self.command, path, None, token, dict(self.headers)))
        if fault := self.hub.take_fault(path, "status"):
            self.say(fault.value, {"error": "the test says so, with hf_abcdefghijkl"})
            return
        if fault := self.hub.take_fault(path, "answer"):
            answer = fault.answer(None, body)
            self.reply(answer)
            self.wfile.write(answer.body)
            return
        signed = path.startswith(("/upload/", "/complete/"))
        if not signed and self.hub.token and token != f"Bearer {self.hub.token}":
            self.say(401, {"error": "Invalid username or password."})
            return
        routes = (
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", self.validate),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/main", self.preupload),
            (r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/upload/(?P<oid>\w+)(/(?P<part>\d+))?", self.put),
            (r"/complete/(?P<oid>\w+)", self.complete),
            (r"/verify", self.verify),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/main", self.commit),
        )
        for pattern, route in routes:
            if match := re.fullmatch(pattern, path):
                route(body, **match.groupdict())
                return
        self.say(404, {"error": "no such route"})

    def read_body(self, size: int) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(size)
        out = b""
        while length := int(self.rfile.readline(), 16):
            out += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def say(self, status: int, document: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        raw = json.dumps(document).encode()
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json", "Content-Length": str(len(raw)), **(headers or {}),
        }.items():  # fmt: skip
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(raw)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            self.say(409, {"error": "You already created this model repo", "url": f"/{name}"})
            return
        self.hub.repositories[name] = {"main": {}}
        self.hub.private[name] = asked.get("visibility") == "private"
        self.say(200, {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})

    def validate(self, body: bytes) -> None:
        ok = json.loads(body)["content"].startswith("---\n")
        self.say(200, {"errors": [] if ok else [{"message": "no header"}], "warnings": []})

    def preupload(self, body: bytes, repo: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > self.hub.large else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.say(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.blobs:
                entry["actions"] = self.actions(asked["oid"], asked["size"])
            objects.append(entry)
        self.say(200, {"transfer": "basic", "objects": objects})

    def actions(self, oid: str, size: int) -> dict[str, Any]:
        at, step = self.hub.endpoint, self.hub.part_bytes
        verify = {"href": f"{at}/verify"}
        if step is None or size <= step:
            return {"upload": {"href": f"{at}/upload/{oid}"}, "verify": verify}
        urls = {str(n + 1): f"{at}/upload/{oid}/{n + 1}" for n in range(-(-size // step))}
        return {
            "upload": {"href": f"{at}/complete/{oid}", "header": {"chunk_size": str(step), **urls}},
            "verify": verify,
        }

    def put(self, body: bytes, oid: str, part: str | None) -> None:
        self.hub.received.append(oid if part is None else f"{oid}/{part}")
        if part is not None:
            self.hub.parts.setdefault(oid, {})[int(part)] = body
        elif not self.store(oid, body):
            return
        self.say(200, {}, {"ETag": f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'})

    def complete(self, body: bytes, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        if self.store(oid, b"".join(parts[n] for n in sorted(parts))):
            self.say(200, {})

    def store(self, oid: str, body: bytes) -> bool:
        if hashlib.sha256(body).hexdigest() != oid:
            self.say(400, {"error": "the bytes are not those of the announced hash"})
            return False
        self.hub.blobs[oid] = body
        return True

    def verify(self, body: bytes) -> None:
        asked = json.loads(body)
        there = len(self.hub.blobs.get(asked["oid"], b"")) == asked["size"]
        self.say(200 if there else 404, {})

    def commit(self, body: bytes, repo: str) -> None:
        added = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
                self.hub.received.append(value["path"])
            elif line["key"] == "lfsFile":
                added[value["path"]] = self.hub.blobs[value["oid"]]
        self.hub.repositories[repo]["main"].update(added)
        self.hub.commits.append(list(added))
        url = f"{self.hub.endpoint}/{repo}/commit/{'1' * 40}"
        self.say(200, {"success": True, "commitUrl": url, "commitOid": "1" * 40})


@contextmanager
def serve(**options: Any) -> Iterator[PublishServer]:
    """Run such a hub, empty, on a free port of the loopback interface for as long as the block lasts."""
    hub = PublishServer({}, **options)
    with hub_server.running(type("Handler", (_Handler,), {"hub": hub})) as port:
        hub.endpoint = hub.storage = f"http://127.0.0.1:{port}"
        yield hub


def page(status: int = 200) -> Answer:
    """What a login page answers in the hub's place."""
    return Answer(status, b"<html>log in</html>", {"Content-Type": "text/html"})
