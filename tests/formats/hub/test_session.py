"""Requests, redirects and bodies on loopback: what is followed, what is sent to whom, and what is never taken."""

from __future__ import annotations

import gzip
import socket
import ssl
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import MAIN, REPO, Answer, Fault, HubServer
from mq_quant.formats.errors import HubError
from mq_quant.formats.hub import session
from mq_quant.formats.hub.client import Hub
from mq_quant.formats.hub.repository import Remote, Repository

SHARD = "model-00001-of-00004.safetensors"
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"


@pytest.fixture
def hub(server: HubServer) -> Hub:
    return Hub(server.endpoint, pause=0.001)


@pytest.fixture
def repository(hub: Hub) -> Repository:
    return hub.resolve(REPO)


@pytest.fixture
def shard(repository: Repository) -> Remote:
    return repository.file(SHARD)


Fetch = Callable[[], bytes]


@pytest.fixture
def fetch(hub: Hub, repository: Repository, shard: Remote, tmp_path: Path) -> Fetch:
    def download() -> bytes:
        hub.download(repository, shard, tmp_path / "shard")
        return (tmp_path / "shard").read_bytes()

    return download


def content(server: HubServer) -> bytes:
    return server.repositories[REPO][MAIN][SHARD]


def answers(
    server: HubServer, answer: Callable[[str | None, bytes], Answer], times: int = 1, at: str = "/storage/"
) -> Fault:
    fault = Fault("answer", at, times, answer=answer)
    server.faults.append(fault)
    return fault


def redirect(to: str, status: int = 302) -> Callable[[str | None, bytes], Answer]:
    return lambda *_: Answer(status, headers={"Location": to})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("form", ["absolute", "without scheme", "path", "with spaces"])
def test_redirects_are_followed(status: int, form: str, server: HubServer, fetch: Fetch) -> None:
    path = f"/storage/{REPO}/{MAIN}/{SHARD}"
    host = server.endpoint.removeprefix("http:")
    to = {
        "absolute": f"http:{host}{path}",
        "without scheme": host + path,
        "path": path,
        "with spaces": f" {path}?a b ",
    }
    answers(server, redirect(to[form], status), at="/resolve/")
    assert fetch() == content(server)


def test_a_renamed_repository_is_followed(server: HubServer, hub: Hub) -> None:
    answers(server, redirect(f"/api/models/{REPO}?blobs=true", 307), at="/api/models/acme/old")
    server.repositories["acme/old"] = server.repositories[REPO]
    assert hub.resolve("acme/old").commit == MAIN


@pytest.mark.parametrize(
    ("to", "text"),
    [
        ("", "without saying where"),
        ("ftp://127.0.0.1/x", "no address of a server"),
        ("javascript:alert(1)", "no address of a server"),
        ("file:///etc/passwd", "no address of a server"),
        ("http://[::1", "no address of a server"),
        ("http://h:99999/", "no address of a server"),
    ],
)
def test_redirects_that_lead_nowhere(to: str, text: str, server: HubServer, fetch: Fetch) -> None:
    answers(server, redirect(to), at="/resolve/")
    with pytest.raises(HubError, match=text) as e:
        fetch()
    assert SHARD in str(e.value)


def test_redirects_that_go_in_circles(server: HubServer, fetch: Fetch) -> None:
    answers(server, redirect(f"/{REPO}/resolve/{MAIN}/{SHARD}"), 99, "/resolve/")
    with pytest.raises(HubError, match=r"8 redirects.*127\.0\.0\.1"):
        fetch()


def test_encryption_is_never_given_up() -> None:
    from mq_quant.formats.hub.session import _target

    assert _target("http://hub.example/a", "https://hub.example/b", "x") == "https://hub.example/b"
    with pytest.raises(HubError, match=r"http://portal\.example, which is not encrypted"):
        _target("https://hub.example/a", "http://portal.example/login?next=sesame", "x")


def test_credentials_and_cookies_stay_with_the_endpoint(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The storage host has another name on the same port; `localhost` and 127.0.0.1 are two hosts."""
    monkeypatch.setenv("HF_TOKEN", "hf_sesame")
    server.token = "hf_sesame"
    cookie = {
        "Set-Cookie": "session=sesame; Path=/",
        "Location": f"{server.storage}/storage/{REPO}/{MAIN}/{SHARD}",
    }
    hub = Hub(server.endpoint, pause=0.001)
    repository = hub.resolve(REPO)
    answers(server, lambda *_: Answer(302, headers=cookie), at=f"/resolve/{MAIN}/{SHARD}")
    hub.download(repository, repository.file(SHARD), tmp_path / "shard")
    for request in server.requests:
        assert ("Authorization" in {k.title() for k in request.headers}) is not request.path.startswith(
            "/storage/"
        )
        assert "cookie" not in {k.lower() for k in request.headers}


def test_a_password_in_the_endpoint_is_sent_to_it_and_shown_nowhere(
    server: HubServer, tmp_path: Path
) -> None:
    endpoint = server.endpoint.replace("//", "//worker:sesame@")
    hub = Hub(endpoint, pause=0.001)
    repository = hub.resolve(REPO)
    assert server.requests[-1].token == "Basic d29ya2VyOnNlc2FtZQ=="
    answers(server, lambda *_: Answer(500), 99, "/resolve/")
    with pytest.raises(HubError, match="answered 500") as e:
        hub.download(repository, repository.file(SHARD), tmp_path / "shard")
    assert "sesame" not in str(e.value) and "127.0.0.1" in str(e.value)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "raw deflate"])
def test_packed_bodies_are_unpacked(coding: str, server: HubServer, fetch: Fetch) -> None:
    def packed(_: str | None, data: bytes) -> Answer:
        raw = zlib.compressobj(wbits=-15)
        bodies = {
            "gzip": gzip.compress(data, 1),
            "deflate": zlib.compress(data, 1),
            "raw deflate": raw.compress(data) + raw.flush(),
        }
        return Answer(200, bodies[coding], {"Content-Encoding": coding.split()[-1]})

    answers(server, packed, 99)
    assert fetch() == content(server)
    assert all(r.headers["accept-encoding"] == "identity" for r in server.requests)


def test_packed_parts_are_not_taken(server: HubServer, fetch: Fetch) -> None:
    """A part of a packed file cannot be put behind a part of the file: the download begins again, without a range."""

    def packed(span: str | None, data: bytes) -> Answer:
        if span is None:
            return Answer(200, data, cut=5000) if first.times == 98 else Answer(200, data)
        begin = int(span.removeprefix("bytes=").split("-")[0])
        headers = {"Content-Encoding": "gzip", "Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}
        return Answer(206, gzip.compress(data[begin:], 1), headers)

    first = answers(server, packed, 99)
    assert fetch() == content(server)
    spans = [r.range for r in server.requests if r.path.startswith("/storage/")]
    assert [s is None for s in spans] == [True, False, True]


@pytest.mark.parametrize("body", [b"", b"not packed at all", gzip.compress(b"x" * 100, mtime=0)[:-9]])
def test_broken_packing_is_told(body: bytes, server: HubServer, fetch: Fetch) -> None:
    answers(server, lambda *_: Answer(200, body, {"Content-Encoding": "gzip"}), 99)
    with pytest.raises(HubError, match=r"Content-Encoding|connection ended after"):
        fetch()


def test_other_codings_are_refused_at_once(server: HubServer, fetch: Fetch) -> None:
    fault = answers(server, lambda _, data: Answer(200, data, {"Content-Encoding": "br"}), 99)
    with pytest.raises(HubError, match="Content-Encoding: 'br'"):
        fetch()
    assert fault.times == 98


def test_chunked_bodies_need_no_length(server: HubServer, fetch: Fetch) -> None:
    def chunked(_: str | None, data: bytes) -> Answer:
        parts = [data[i : i + 50_000] for i in range(0, len(data), 50_000)]
        body = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n"
        return Answer(200, body, {"Transfer-Encoding": "chunked", "Content-Length": ""})

    answers(server, chunked)
    assert fetch() == content(server)


def test_bodies_until_the_connection_ends(server: HubServer, fetch: Fetch) -> None:
    """Without any length, an end that comes too early is seen by the size that the hub states."""
    fault = answers(server, lambda _, data: Answer(200, data[: len(data) // 2], {"Content-Length": ""}))
    assert fetch() == content(server)
    assert fault.times == 0


def test_a_chunked_body_that_breaks_off(server: HubServer, fetch: Fetch) -> None:
    body = b"400\r\n" + b"x" * 100
    answers(server, lambda *_: Answer(200, body, {"Transfer-Encoding": "chunked", "Content-Length": ""}))
    assert fetch() == content(server)


@pytest.mark.parametrize(
    "part",
    [
        lambda a, d: Answer(200, d),
        lambda a, d: Answer(206, d, {"Content-Range": f"bytes 0-{len(d) - 1}/{len(d)}"}),
        lambda a, d: Answer(206, d[a + 1 :], {"Content-Range": f"bytes {a + 1}-{len(d) - 1}/{len(d)}"}),
        lambda a, d: Answer(206, d[a:], {"Content-Range": f"bytes {a}-{len(d)}/{len(d) + 1}"}),
        lambda a, d: Answer(206, d[a:], {}),
        lambda a, d: Answer(206, b"--x", {"Content-Type": "multipart/byteranges; boundary=x"}),
        lambda a, d: Answer(206, b"x" * (len(d) - a), {"Content-Range": f"bytes {a}-{len(d) - 1}/{len(d)}"}),
        lambda a, d: Answer(206, d[a:] + b"more", {"Content-Range": f"bytes {a}-{len(d) - 1}/{len(d)}"}),
        lambda a, d: Answer(206, d[a : a + 99], {"Content-Range": f"bytes {a}-{a + 98}/{len(d)}"}),
        lambda a, d: Answer(416, b"", {"Content-Range": f"bytes */{len(d)}"}),
        lambda a, d: Answer(416),
        lambda a, d: Answer(200, PAGE, {"Content-Type": "text/html"}),
        lambda a, d: Answer(206, PAGE, {"Content-Type": "text/html"}),
    ],
    ids=[
        "whole", "whole as a part", "later", "of another size", "without a range", "in parts", "other bytes",
        "too much", "less", "no range", "no range, no size", "page", "page as a part",
    ],
)  # fmt: skip
def test_the_rest_of_a_file_is_taken_only_where_it_is_that(
    part: Callable[[int, bytes], Answer], server: HubServer, fetch: Fetch
) -> None:
    def drops(span: str | None, data: bytes) -> Answer:
        if span is None:
            return Answer(200, data, cut=5000) if fault.times == 98 else Answer(200, data)
        begin = int(span.removeprefix("bytes=").split("-")[0])
        return (
            part(begin, data)
            if fault.times == 97
            else Answer(206, data[begin:], {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"})
        )

    fault = answers(server, drops, 99)
    assert fetch() == content(server)


@pytest.mark.parametrize(
    "extra", [{"ETag": '"other"'}, {"ETag": 'W/"weak"'}, {"ETag": ""}, {"Content-Type": "text/html"}]
)
def test_the_hash_decides_not_what_headers_say(
    extra: dict[str, str], server: HubServer, fetch: Fetch
) -> None:
    answers(server, lambda _, data: Answer(200, data, extra))
    assert fetch() == content(server)


def test_a_mirror_that_always_serves_less_is_given_up(
    server: HubServer, fetch: Fetch, tmp_path: Path
) -> None:
    def less(span: str | None, data: bytes) -> Answer:
        data = data[:-1000]
        begin = int((span or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if begin >= len(data):
            return Answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        return (
            Answer(200, data)
            if span is None
            else Answer(206, data[begin:], {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"})
        )

    answers(server, less, 999)
    with pytest.raises(HubError, match=r"the connection ended after|no such range") as e:
        fetch()
    assert SHARD in str(e.value)
    assert not (tmp_path / "shard").exists()


def test_expired_addresses_are_renewed(server: HubServer, fetch: Fetch) -> None:
    answers(server, lambda *_: Answer(403, b"<?xml?><Error>expired</Error>"), 2)
    assert fetch() == content(server)
    assert sum("/resolve/" in r.path and r.path.endswith(SHARD) for r in server.requests) == 3


def test_headers_that_are_no_http(server: HubServer, fetch: Fetch) -> None:
    answers(server, lambda _, data: Answer(200, data, {"Content-Length": "many"}))
    assert fetch() == content(server)


def test_a_connection_that_is_slow_beyond_use(
    server: HubServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mq_quant.formats.hub.body.SLOW_SECONDS", 0.0)
    monkeypatch.setattr("mq_quant.formats.hub.body.SLOW_BYTES", 1 << 40)
    with pytest.raises(HubError, match="bytes came in"):
        fetch()


def test_a_message_that_repeats_the_token_is_shown_without_it(
    server: HubServer, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "plainsesame")
    server.faults.append(
        Fault(
            "answer", "/api/", answer=lambda *_: Answer(418, b"", {"X-Error-Message": "not for plainsesame"})
        )
    )
    with pytest.raises(HubError, match="not for …") as e:
        hub.resolve(REPO)
    assert "sesame" not in str(e.value)


@pytest.mark.parametrize("name", ["ALL_PROXY", "HTTP_PROXY"])
def test_a_proxy_that_cannot_be_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils._http import close_session

    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    close_session()
    try:
        for proxy, text in (
            ("socks5://worker:sesame@127.0.0.1:9", "socks|127.0.0.1"),
            ("gopher://worker:sesame@127.0.0.1:9", "address of a proxy"),
            ("http://worker:sesame@127.0.0.1:9", r"through the proxy http://127\.0\.0\.1:9"),
        ):
            monkeypatch.setenv(name, proxy)
            with pytest.raises(HubError, match=f"(?i){text}") as e:
                Hub("http://hub.invalid", pause=0.0001).resolve(REPO)
            assert "sesame" not in str(e.value)
            close_session()
    finally:
        close_session()


def test_certificates_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils._http import close_session

    (tmp_path / "no.pem").write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "no.pem"))
    close_session()
    try:
        with pytest.raises(HubError, match="SSL_CERT_FILE"):
            Hub("https://127.0.0.1:9", pause=0.0001).resolve(REPO)
    finally:
        close_session()


def test_a_server_that_speaks_no_tls(server: HubServer) -> None:
    with pytest.raises(HubError, match="does not answer with encryption"):
        Hub(server.endpoint.replace("http", "https"), pause=0.001).resolve(REPO)


def test_a_host_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(HubError, match=r"connection failed: no host of this name is known.*hub\.invalid"):
        Hub("http://hub.invalid", pause=0.0001).resolve(REPO)


def silent(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The server lets one request wait until the event is set; limits are short."""
    go_on = threading.Event()
    monkeypatch.setattr(session, "SILENCE", 0.01)
    monkeypatch.setattr(session, "LOOK", 0.01)
    monkeypatch.setattr(session, "CONNECT_SECONDS", 0.05)

    def wait() -> None:
        go_on.wait(10)

    server.faults.append(Fault("hook", "/storage/", call=wait))
    return go_on


def test_a_server_that_never_answers(
    server: HubServer, repository: Repository, shard: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()
    hub = Hub(server.endpoint, pause=0.001, notify=said.append)
    go_on = silent(server, monkeypatch)
    monkeypatch.setattr("mq_quant.formats.hub.settings.read_seconds", lambda: 0.05)
    try:
        hub.download(repository, shard, tmp_path / "shard")
    finally:
        go_on.set()
    assert (tmp_path / "shard").read_bytes() == content(server)
    assert "localhost" in said[0] and "has not answered" in said[0]


def test_headers_that_never_end(server: HubServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, so that only a limit for all of them helps."""
    monkeypatch.setattr(session, "CONNECT_SECONDS", 0.05)
    monkeypatch.setattr("mq_quant.formats.hub.settings.read_seconds", lambda: 0.1)
    server.faults.append(Fault("drip", "/storage/"))
    assert fetch() == content(server)


UNSET = "correct it, or unset it to use https://huggingface.co"


def no_host(*_: object) -> list[object]:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_a_host_that_nobody_knows_is_told_and_who_named_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", no_host)
    monkeypatch.setenv("HF_ENDPOINT", "https://user:word@hugingface.test")
    with pytest.raises(HubError, match="no host of this name is known here") as e:
        Hub(pause=0.001).resolve(REPO)
    assert f"HF_ENDPOINT is https://hugingface.test: {UNSET}" in str(e.value) and "word" not in str(e.value)
    monkeypatch.delenv("HF_ENDPOINT")
    with pytest.raises(HubError, match="no host of this name is known here") as e:
        Hub("https://huggingface.test", pause=0.001).resolve(REPO)
    assert UNSET not in str(e.value) and "check the network" in str(e.value)


def test_a_port_on_which_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(HubError, match="it was refused, so no server listens there") as e:
            Hub(pause=0.001).resolve(REPO)
    assert UNSET in str(e.value)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Answer(200, PAGE, {"Content-Type": "text/html"}), "a web page"),
        (Answer(404, PAGE, {"Content-Type": "text/html"}), "answered 404 with a web page"),
        (Answer(401, b"{}"), "no such repository, or no access"),
        (Answer(200, b"{}"), "states no commit"),
        (Answer(200, b"hello"), "does not speak the hub's API"),
        (Answer(500, b""), "answered 500"),
    ],
)
def test_what_answers_as_no_hub_does_is_put_down_to_the_variable(
    answer: Answer, problem: str, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(server, lambda *_: answer, times=9, at="/api/models/")
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    with pytest.raises(HubError, match=problem) as e:
        Hub(pause=0.001).resolve(REPO)
    assert f"HF_ENDPOINT is {server.endpoint}: {UNSET}" in str(e.value)


def test_a_name_that_the_hub_itself_does_not_know_is_no_fault_of_the_variable(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(server, lambda *_: Answer(404, headers={"X-Error-Code": "RepoNotFound"}), at="/api/models/")
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    with pytest.raises(HubError, match="no such repository") as e:
        Hub(pause=0.001).resolve(REPO)
    assert UNSET not in str(e.value)


def test_encryption_where_none_is_spoken(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint.replace("http:", "https:"))
    with pytest.raises(HubError, match="does not answer with encryption") as e:
        Hub(pause=0.001).resolve(REPO)
    assert UNSET in str(e.value)


def test_other_faults_of_encryption(monkeypatch: pytest.MonkeyPatch) -> None:
    def handshake(*_: object, **__: object) -> None:
        raise ssl.SSLError(1, "[SSL: TLSV1_ALERT_PROTOCOL_VERSION] tlsv1 alert protocol version")

    with socket.create_server(("127.0.0.1", 0)) as silent_server:
        monkeypatch.setattr(ssl.SSLContext, "wrap_socket", handshake)
        monkeypatch.setenv("HF_ENDPOINT", f"https://127.0.0.1:{silent_server.getsockname()[1]}")
        with pytest.raises(HubError, match=r"no encrypted connection came about: .*PROTOCOL_VERSION") as e:
            Hub(pause=0.001).resolve(REPO)
    assert UNSET in str(e.value)
