"""One GET to the hub and the hosts that it redirects to, through huggingface_hub's session: proxy, TLS, offline mode.

Redirects are followed here, so that credentials stay with the endpoint, an encrypted connection stays encrypted, and
errors can name the host that answered. Faults of the transport become AgainError or HubError.
"""

from __future__ import annotations

import errno
import ssl
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

from ..errors import HubError
from .answers import Asked, check_body, check_coding, check_status
from .endpoint import Endpoint, origin, proxy_of, redacted, shown
from .patience import ADVICE, AgainError, Patience

REDIRECTS = (301, 302, 303, 307, 308)
LONGEST_CHAIN = 8
CONNECT_SECONDS = 8.0
SHORT_BODY = 64 << 10
SLOW_SECONDS, SLOW_BYTES = 60.0, 64 << 10
"""A body of which fewer bytes than SLOW_BYTES came in SLOW_SECONDS counts as a dropped connection."""
_SOCKS = "install the package for SOCKS proxies (pip install socksio), or unset the variable of the proxy (ALL_PROXY)"
_PROXY = "check the addresses in HTTP_PROXY, HTTPS_PROXY and ALL_PROXY: http://host:port, or unset them"
_CERTIFICATE = (
    "if a proxy opens encrypted connections, name its certificate in SSL_CERT_FILE; check the clock too"
)


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
        text = self.headers.get("content-length", "")
        return int(text) if text.isdecimal() and not self.packed else None


@contextmanager
def ask(
    endpoint: Endpoint, url: str, what: str, patience: Patience, *, span: str | None = None, read: float
) -> Iterator[Answer]:
    """GET `url`, with `span` as its Range; the body arrives while the block lasts. Raises HubError or AgainError.

    `what` is the file or repository that errors name; `read` are the seconds that a read may take.
    """
    commits: list[str] = []
    client = _client(what)
    for _ in range(LONGEST_CHAIN):
        with _sent(client, endpoint, url, what, patience, span, read) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            if "x-repo-commit" in headers:
                commits.append(headers["x-repo-commit"])
            if response.status_code not in REDIRECTS:
                trusted = origin(url) == origin(endpoint.url)
                asked = Asked(what, shown(url), trusted, trusted and endpoint.has_secret)
                check_status(asked, response.status_code, headers)
                packed = check_coding(asked, headers)
                chunks = _chunks(response, asked, headers)
                yield Answer(asked, response.status_code, headers, tuple(commits), packed, chunks)
                return
            _drain(response, headers)
            url = _target(url, headers.get("location"), what)
    raise HubError(f"{LONGEST_CHAIN} redirects follow each other; the last leads to {shown(url)}", file=what)


def _client(what: str) -> Any:
    """huggingface_hub's HTTP client. Making it reads the proxies of the environment and the TLS certificates."""
    from huggingface_hub import get_session

    try:
        return get_session()
    except ImportError as e:
        raise HubError(f"the proxy cannot be used: {redacted(e)[:200]}", file=what, hint=_SOCKS) from None
    except OSError as e:  # ssl.SSLError is one
        problem = f"the certificates of SSL_CERT_FILE or SSL_CERT_DIR cannot be loaded: {e.strerror or e}"
        raise HubError(problem, file=what, hint="correct the variable, or unset it") from None
    except Exception:  # ValueError, or httpx's InvalidURL, whose package has another name in each release
        raise HubError("the address of a proxy is not one that can be used", file=what, hint=_PROXY) from None


def _target(url: str, location: str | None, what: str) -> str:
    """Where a redirect from `url` leads. HubError where it leads nowhere, or out of encryption."""
    if not location:
        raise HubError(f"{shown(url)} redirects without saying where to", file=what)
    try:
        target = urljoin(url, location.strip())
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
def _sent(
    client: Any, endpoint: Endpoint, url: str, what: str, patience: Patience, span: str | None, read: float
) -> Iterator[Any]:
    """The answer to one request, its headers read, and closed after the block."""
    headers = {**endpoint.headers(url), "accept-encoding": "identity"}
    if span is not None:
        headers["range"] = span
    with _faults(client, url, what):
        times = (min(CONNECT_SECONDS, read), read, read, read)
        request = client.build_request("GET", url, headers=headers, timeout=times)
        request.headers.pop("cookie", None)
        with patience.watched(shown(url)):
            response = client.send(request, stream=True, follow_redirects=False)
        try:
            yield response
        finally:
            response.close()


def _drain(response: Any, headers: Mapping[str, str]) -> None:
    """Read the short body of a redirect, so that the connection can be used again."""
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) <= SHORT_BODY:
        for _ in response.iter_raw():
            pass


def _chunks(response: Any, asked: Asked, headers: Mapping[str, str]) -> Iterator[bytes]:
    """The body, unpacked. AgainError where it is a web page, or comes so slowly that the connection counts as dead."""
    began, came, head = time.monotonic(), 0, True
    for chunk in response.iter_bytes():
        if head and chunk:
            check_body(asked, headers, chunk[:512])
            head = False
        came += len(chunk)
        yield chunk
        if (now := time.monotonic()) - began > SLOW_SECONDS:
            if came < SLOW_BYTES:
                raise AgainError(f"only {came} bytes came in {now - began:.0f} s", host=asked.host)
            began, came = now, 0


@contextmanager
def _faults(client: Any, url: str, what: str) -> Iterator[None]:
    """Turns the faults of huggingface_hub's transport (httpx, under the name that its release has) into ours."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    transport: Any = sys.modules[type(client).__module__.partition(".")[0]]
    try:
        yield
    except OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE forbids the network", file=what) from None
    except transport.DecodingError:
        problem = "the answer was packed on the way (Content-Encoding) and cannot be unpacked"
        raise AgainError(problem, host=shown(url), content=True, tries=4) from None
    except (transport.InvalidURL, transport.UnsupportedProtocol, UnicodeError) as e:
        raise HubError(f"{shown(url)} cannot be asked: {redacted(e)[:200]}", file=what) from None
    except transport.HTTPError as e:
        raise _connection(e, url, what) from None
    except (ConnectionError, TimeoutError, ssl.SSLError) as e:
        raise _connection(e, url, what) from None
    except OSError as e:
        if e.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL):
            raise _connection(e, url, what) from None
        raise


def _connection(e: Exception, url: str, what: str) -> Exception:
    """The fault of a connection: HubError where it will not pass (a certificate, a proxy's login), else AgainError."""
    text = redacted(e)[:200] or type(e).__name__
    chain: list[BaseException] = [e]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    host, proxy = shown(url), proxy_of(url)
    through = f" through the proxy {proxy}" if proxy else ""
    if any(isinstance(c, ssl.SSLCertVerificationError) for c in chain) or "CERTIFICATE_VERIFY_FAILED" in text:
        problem = f"the certificate of {host} cannot be trusted{through}: {text}"
        return HubError(problem, file=what, hint=_CERTIFICATE)
    if "WRONG_VERSION_NUMBER" in text or "record layer failure" in text.lower():
        problem = f"{host} does not answer with encryption{through}: {text}"
        return HubError(
            problem, file=what, hint="check whether HF_ENDPOINT or the proxy is http:// or https://"
        )
    if type(e).__name__ == "ProxyError":
        if "407" in text:
            hint = "put its user name and password into its address: http://user:password@host:port"
            return HubError(f"the proxy {proxy or ''} asks for a login", file=what, hint=hint)
        return AgainError(f"the proxy {proxy or ''} does not connect: {text}", host=host, hint=_PROXY)
    kind = "the connection timed out" if "Timeout" in type(e).__name__ else "the connection failed"
    hint = f"{ADVICE}; requests go through the proxy {proxy}" if proxy else ADVICE
    return AgainError(f"{kind}{through}: {text}", host=host, hint=hint)
