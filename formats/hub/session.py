"""One GET to the hub and to the hosts that it redirects to.

Redirects are followed here, so that credentials stay with the endpoint, an encrypted connection stays encrypted, and
errors can name the host that answered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from urllib.parse import quote, urljoin

from ..errors import HubError
from .answers import Asked, check_coding, check_status, content_length
from .body import drain, watched
from .endpoint import Endpoint, origin, shown
from .patience import AgainError, Patience
from .transport import faults, session

T = TypeVar("T")

REDIRECTS = (301, 302, 303, 307, 308)
LONGEST_CHAIN = 8
CONNECT_SECONDS = 8.0
_IN_URLS = "%/:=&?~#+!$,;'@()*[]"
LOOK = 0.25
"""Seconds between two looks whether a transfer is to end, while nothing comes."""
SILENCE = 5.0
"""Seconds after which a request without any answer is spoken of."""


@dataclass(frozen=True)
class Answer:
    """An answer whose body counts: its status, its headers in lower case, and the commits that the hops named."""

    asked: Asked
    status: int
    headers: Mapping[str, str]
    commits: tuple[str, ...]
    packed: bool
    """Whether the body was packed on the way (Content-Encoding); `chunks` gives it unpacked."""
    chunks: Iterator[bytes]

    @property
    def length(self) -> int | None:
        """The bytes that the body will have, where the answer states them and nothing is packed."""
        return None if self.packed else content_length(self.headers)


@dataclass(frozen=True)
class Line:
    """The way to one hub: its endpoint with the secrets, and the patience that all requests share."""

    endpoint: Endpoint
    patience: Patience

    def retried(self, what: str, attempt: Callable[[], T], gained: Callable[[], int] = lambda: 0) -> T:
        """As `Patience.retried`, of this hub's address."""
        return self.patience.retried(what, shown(self.endpoint.url), attempt, gained)


@contextmanager
def ask(line: Line, what: str, url: str, read: float, span: str | None = None) -> Iterator[Answer]:
    """GET `url`, with `span` as its Range; the body arrives while the block lasts. Raises HubError or AgainError.

    `what` is the file or repository that errors name; `read` are the seconds that one read may take.
    """
    commits: list[str] = []
    for _ in range(LONGEST_CHAIN):
        with _sent(line, "GET", what, url, read, span) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            if "x-repo-commit" in headers:
                commits.append(headers["x-repo-commit"])
            if "x-error-message" in headers:
                headers["x-error-message"] = line.endpoint.without_secrets(headers["x-error-message"])
            if response.status_code not in REDIRECTS:
                trusted = origin(url) == origin(line.endpoint.url)
                asked = Asked(what, shown(url), trusted, trusted and line.endpoint.has_secret)
                check_status(asked, response.status_code, headers)
                packed = check_coding(asked, headers)
                chunks = watched(response, asked, headers, packed, line.patience)
                try:
                    yield Answer(asked, response.status_code, headers, tuple(commits), packed, chunks)
                finally:
                    chunks.close()
                return
            drain(response, headers)
            url = _target(url, headers.get("location"), what)
    raise HubError(f"{LONGEST_CHAIN} redirects follow each other; the last leads to {shown(url)}", file=what)


def knock(line: Line, what: str, read: float) -> None:
    """Wait for any answer of the endpoint, whatever its status. Raises HubError or AgainError."""
    with _sent(line, "HEAD", what, line.endpoint.url, read, None):
        pass


def _target(url: str, location: str | None, what: str) -> str:
    """Where a redirect from `url` leads. HubError where it leads nowhere, or out of encryption."""
    if not location:
        raise HubError(f"{shown(url)} redirects without saying where to", file=what)
    try:
        target = urljoin(url, quote(location.strip(), safe=_IN_URLS))
    except ValueError:
        target = ""
    scheme = origin(target)[0]
    if not scheme:
        raise HubError(f"{shown(url)} redirects to what is no address of a server", file=what)
    if scheme == "http" and origin(url)[0] == "https":
        problem = f"{shown(url)} redirects to {shown(target)}, which is not encrypted"
        raise HubError(problem, file=what, hint="a login page of the network may do so; check HF_ENDPOINT")
    return target


@contextmanager
def _sent(line: Line, method: str, what: str, url: str, read: float, span: str | None) -> Iterator[Any]:
    """The answer to one request, its headers read, and closed after the block."""
    headers = {**line.endpoint.headers(url), "accept-encoding": "identity"}
    if span is not None:
        headers["range"] = span
    client = session(what)
    with faults(client, url, what):
        times = (min(CONNECT_SECONDS, read), read, read, read)
        request = client.build_request(method, url, headers=headers, timeout=times)
        request.headers.pop("cookie", None)
        response = _headers(line, client, request, shown(url), CONNECT_SECONDS + 2 * read)
        try:
            yield response
        finally:
            response.close()


def _headers(line: Line, client: Any, request: Any, host: str, limit: float) -> Any:
    """The answer to a request once its headers are here. AgainError where they are not within `limit` seconds.

    Time limits of reads do not bound a server that sends a few bytes now and then. So another thread waits for it, and
    is left alone with a connection that nobody needs where the limit passes.
    """
    box: SimpleQueue[Any] = SimpleQueue()
    left = threading.Event()

    def wait() -> None:
        try:
            response = client.send(request, stream=True, follow_redirects=False)
        except BaseException as e:
            box.put(e)
            return
        box.put(response)
        if left.is_set():
            response.close()

    threading.Thread(target=wait, name="hub", daemon=True).start()
    began, spoke = time.monotonic(), False
    while (waited := time.monotonic() - began) < limit:
        try:
            found = box.get(timeout=min(LOOK, limit - waited))
        except Empty:
            line.patience.check(host)
            if waited >= SILENCE and not spoke:
                line.patience.say(f"{host} has not answered for {waited:.0f} s; waiting")
                spoke = True
            continue
        if isinstance(found, BaseException):
            raise found
        return found
    left.set()
    with suppress(Empty, AttributeError):  # it came in this very moment
        box.get_nowait().close()
    raise AgainError(f"no answer came in {limit:.0f} s", host=host)
