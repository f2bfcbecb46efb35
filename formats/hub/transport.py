"""huggingface_hub's session (proxy, TLS, offline mode), and what its faults mean: another attempt, or the end."""

from __future__ import annotations

import errno
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import HubError
from .advice import about
from .endpoint import proxy_of, redacted, shown
from .patience import ADVICE, AgainError

_SOCKS = "install the package for SOCKS proxies (pip install socksio), or unset the variable of the proxy (ALL_PROXY)"
_PROXY = "check the addresses in HTTP_PROXY, HTTPS_PROXY and ALL_PROXY: http://host:port, or unset them"
_CERTIFICATE = (
    "if a proxy opens encrypted connections, name its certificate in SSL_CERT_FILE; check the clock too"
)


def session(what: str) -> Any:
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


@contextmanager
def faults(client: Any, url: str, what: str) -> Iterator[None]:
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
        return HubError(problem, file=what, hint=about(url, _CERTIFICATE))
    if "WRONG_VERSION_NUMBER" in text or "record layer failure" in text.lower():
        problem = f"{host} does not answer with encryption{through}: {text}"
        hint = "check whether HF_ENDPOINT or the proxy is http:// or https://"
        return HubError(problem, file=what, hint=about(url, hint))
    if type(e).__name__ == "ProxyError":
        if "407" in text:
            hint = "put its user name and password into its address: http://user:password@host:port"
            return HubError(f"the proxy {proxy or ''} asks for a login", file=what, hint=hint)
        return AgainError(f"the proxy {proxy or ''} does not connect: {text}", host=host, hint=_PROXY)
    if proxy is None and (why := _unreachable(chain)):
        return AgainError(f"the connection failed: {why}", host=host, hint=about(url, ADVICE))
    kind = "the connection timed out" if "Timeout" in type(e).__name__ else "the connection failed"
    hint = f"{ADVICE}; requests go through the proxy {proxy}" if proxy else about(url, ADVICE)
    why = "" if text in ("timed out", "The read operation timed out") else f": {text}"
    return AgainError(f"{kind}{through}{why}", host=host, hint=hint)


def _unreachable(chain: list[BaseException]) -> str:
    """What is wrong with an address of which no server was reached; nothing where one was, or nothing is known."""
    if any(isinstance(c, socket.gaierror) for c in chain):
        return "no host of this name is known here"
    if any(isinstance(c, ConnectionRefusedError) for c in chain):
        return "it was refused, so no server listens there"
    if any(isinstance(c, ssl.SSLError) for c in chain):
        said = next(str(c) for c in chain if isinstance(c, ssl.SSLError))
        return f"no encrypted connection came about: {said[:200]}"
    return ""
