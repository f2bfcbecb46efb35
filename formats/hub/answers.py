"""What an answer of HTTP means: usable, worth another attempt, or the end, with the sentence that says so."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime

from ..errors import HubError
from .advice import about
from .patience import ADVICE, AgainError

LOGIN_TRIES = 5
"""Attempts where a page answers in the hub's place: the person has some seconds to log in, no more."""
USABLE = (200, 203, 206)
LOGIN = "log in to the network in a browser, or check HF_ENDPOINT and the proxy"
PACKED = "a proxy packs what nobody asked it to pack; go round it (NO_PROXY), or have it leave files alone"
_PASSING = {408, 421, 423, 425, 429, *range(500, 600)} - {501, 505, 511}
_STORAGE_PASSING = (400, 401, 403, 404, 410)
"""What a storage host says of a signed address that has grown old, or of a copy that has not arrived yet."""
STORAGE_TRIES = 4
_HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head|script|meta|\?xml|!--)", re.IGNORECASE)
_RANGE = re.compile(r"bytes\s+(\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_LIMITS = ("ratelimit", "x-ratelimit", "x-rate-limit")
_RESET = re.compile(r"\b(?:t|reset)\s*=\s*(\d+)")
_LEFT = re.compile(r"\b(?:r|remaining)\s*=\s*(\d+)")
_ACCESS = "check the name; if it is private, set HF_TOKEN to a token that may read it"
_REFUSED = "the token was sent and does not help: it must be valid, and its account must have access"
_TERMS = "accept its terms on the hub's page of the model"
_REFUSALS: dict[str, tuple[str, str | None, str | None]] = {
    "GatedRepo": (
        "access to this repository is restricted",
        f"{_TERMS}, and set HF_TOKEN to a token that may read it",
        f"{_TERMS}; {_REFUSED}",
    ),
    "RepoNotFound": ("there is no such repository, or no access to it", _ACCESS, _REFUSED),
    "RevisionNotFound": ("there is no such revision", None, None),
    "EntryNotFound": ("there is no such file in this revision", None, None),
}
"""By the hub's code: the problem, and what to do without and with a token."""
_HINTS: dict[int, str] = dict.fromkeys((404, 410), "check the name and the revision")
_TOO_MANY = "too many requests from this address or account: wait some minutes, or set HF_TOKEN"
_PROXY_LOGIN = (
    "put user name and password into the proxy's address (HTTPS_PROXY=http://user:password@host:port)"
)


@dataclass(frozen=True)
class Asked:
    """A request as its errors tell it: `what` is the file or repository, `host` the address that answered.

    `trusted` says that the endpoint itself answered and no other host, `secret` that the endpoint got a token.
    """

    what: str
    host: str
    trusted: bool
    secret: bool


def check_status(asked: Asked, status: int, headers: Mapping[str, str]) -> None:
    """Raises HubError or AgainError unless the status is one of those whose body counts. Keys are in lower case."""
    if status in USABLE:
        return
    if status == 511:
        raise login_page(asked)
    if status == 407:
        problem = f"the proxy asks for a login (407); {asked.host} was to be asked"
        raise HubError(problem, file=asked.what, hint=_PROXY_LOGIN)
    if status in _PASSING:
        hint = _TOO_MANY if status == 429 else about(asked.host, ADVICE)
        raise AgainError(
            f"the hub answered {status}", wait=_wish(status, headers), host=asked.host, hint=hint
        )
    if not asked.trusted and status in _STORAGE_PASSING:
        problem = f"the hub answered {status} from its storage host"
        raise AgainError(problem, host=asked.host, tries=STORAGE_TRIES, content=True)
    if status == 416:
        raise RangeError("the hub answered 416: it has no such range", host=asked.host, content=True)
    raise _refusal(asked, status, headers)


def _refusal(asked: Asked, status: int, headers: Mapping[str, str]) -> HubError:
    """The error of a status that will not pass, from the hub's own code (X-Error-Code) where it sends one."""
    code = headers.get("x-error-code", "")
    if code not in _REFUSALS and status == 401 and not asked.secret:
        code = "RepoNotFound"  # what the hub says of private repositories
    if code in _REFUSALS:
        problem, *hints = _REFUSALS[code]
        hint = hints[asked.secret]
        stated = "x-error-code" in headers  # the hub itself speaks
        return HubError(
            problem, file=asked.what, hint=hint if stated or hint is None else about(asked.host, hint)
        )
    said = f", {headers['x-error-message'][:200]!r}" if "x-error-message" in headers else ""
    if "html" in headers.get("content-type", "").lower():
        said += " with a web page, which may be a proxy's"
    hint = _HINTS.get(status, "check HF_ENDPOINT and the proxy")
    if status in (401, 403):
        hint = _REFUSED if asked.secret else _ACCESS
    problem = f"the hub answered {status}{said}; the address is {asked.host}"
    return HubError(problem, file=asked.what, hint=about(asked.host, hint))


class RangeError(AgainError):
    """The server cannot serve the rest of a file: the next attempt begins at its first byte."""


def check_body(asked: Asked, headers: Mapping[str, str], head: bytes) -> None:
    """Raises AgainError where the first bytes of a body are those of a web page in the hub's place."""
    kind = headers.get("content-type", "").lower()
    if _HTML.match(head) or ("html" in kind and head.lstrip()[:1] == b"<"):
        raise login_page(asked)


def login_page(asked: Asked) -> AgainError:
    """The fault of a network that answers every request with its own page."""
    return AgainError(
        "a web page (HTML) answered, not the hub: a login page or a proxy's message",
        host=asked.host,
        tries=LOGIN_TRIES,
        hint=about(asked.host, LOGIN),
        content=True,
    )


def check_coding(asked: Asked, headers: Mapping[str, str]) -> bool:
    """Whether the body is packed (Content-Encoding) in a way that can be undone. HubError for other codings."""
    given = headers.get("content-encoding", "")
    codings = [c for c in (part.strip().lower() for part in given.split(",")) if c not in ("", "identity")]
    if any(c not in ("gzip", "x-gzip", "deflate") for c in codings):
        problem = f"the answer is packed (Content-Encoding: {given[:40]!r}), which cannot be undone here"
        raise HubError(f"{problem}; the address is {asked.host}", file=asked.what, hint=PACKED)
    return bool(codings)


def body_start(asked: Asked, status: int, headers: Mapping[str, str], start: int, size: int) -> int:
    """The place in the file of a body's first byte: `start`, or 0 where the server sends the whole file instead.

    `size` is the file's size in bytes. Raises RangeError where the body is another part, or a part of another file.
    """
    if status != 206:
        return 0
    match = _RANGE.fullmatch(headers.get("content-range", "").strip())
    if match is None or int(match[1]) != start or int(match[2]) < start:
        problem = f"the hub sent another part of the file than bytes {start} and on"
        raise RangeError(problem, host=asked.host, content=True)
    if match[3] != "*" and int(match[3]) != size:
        problem = f"the copy that answered has {int(match[3])} bytes, not the {size} that the hub states"
        raise RangeError(problem, host=asked.host, content=True)
    return start


def content_length(headers: Mapping[str, str]) -> int | None:
    """The bytes of a body as the answer states them; None where it states nothing that can be."""
    text = headers.get("content-length", "")
    return int(text) if text.isdecimal() and len(text) <= 18 else None


def _wish(status: int, headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait: Retry-After, else the rate-limit headers in their several spellings."""
    asked = _seconds(headers.get("retry-after", ""), headers)
    if asked is None and status in (429, 503):
        found = [
            float(reset[1])
            for name in _LIMITS
            for policy in headers.get(name, "").split(",")
            if (reset := _RESET.search(policy)) and (left := _LEFT.search(policy)) and float(left[1]) == 0
        ]
        found += [
            wait
            for name in _LIMITS
            if headers.get(f"{name}-remaining", "0").strip() == "0"
            and (wait := _seconds(headers.get(f"{name}-reset", ""), headers)) is not None
        ]
        asked = max(found, default=None)
    return max(asked, 0.0) if asked is not None and math.isfinite(asked) else 0.0


def _seconds(text: str, headers: Mapping[str, str]) -> float | None:
    """A wait from a number of seconds, a point in time in seconds since 1970, or a date; None for anything else.

    A date is held against the server's own clock, since this machine's may be wrong.
    """
    text = text.strip().removesuffix("s")
    try:
        value = float(text)
    except ValueError:
        when, now = _date(text), _date(headers.get("date", ""))
        return None if when is None else when - (time.time() if now is None else now)
    if not math.isfinite(value):
        return None
    if value > 1e12:  # milliseconds since 1970
        value /= 1000
    return value - (_date(headers.get("date", "")) or time.time()) if value > 1e9 else value


def _date(text: str) -> float | None:
    """Seconds since 1970 of a date in any of HTTP's three forms, all of which mean UTC; None for anything else."""
    try:
        when = parsedate_to_datetime(text)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
