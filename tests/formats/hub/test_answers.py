"""What an answer means: its status, the wait it asks for, its coding, the part of the file that it brings."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.errors import HubError
from mq_quant.formats.hub.answers import (
    LOGIN_TRIES,
    Asked,
    RangeError,
    body_start,
    check_body,
    check_coding,
    check_status,
    content_length,
)
from mq_quant.formats.hub.patience import AgainError

HUB = Asked("a/b", "https://hub.example", trusted=True, secret=False)
KNOWN = Asked("a/b", "https://hub.example", trusted=True, secret=True)
STORAGE = Asked("a/b", "https://storage.example", trusted=False, secret=False)
NOW = 1_700_000_000
DATE = formatdate(NOW, usegmt=True)


def wish(status: int = 429, **headers: str) -> float:
    with pytest.raises(AgainError) as e:
        check_status(HUB, status, {name.replace("_", "-"): value for name, value in headers.items()})
    return e.value.wait


@pytest.mark.parametrize("status", [200, 203, 206])
def test_usable(status: int) -> None:
    check_status(HUB, status, {})


@pytest.mark.parametrize(
    "status", [408, 421, 423, 425, 429, 500, 502, 503, 504, 507, 509, 520, 524, 530, 599]
)
def test_what_may_pass_is_tried_again(status: int) -> None:
    with pytest.raises(AgainError, match=f"answered {status}") as e:
        check_status(HUB, status, {})
    assert e.value.host == HUB.host


@pytest.mark.parametrize(
    "status", [100, 204, 205, 300, 304, 400, 402, 405, 406, 409, 410, 412, 414, 431, 451, 501, 505]
)
def test_what_will_not_pass_is_an_error_that_names_the_host(status: int) -> None:
    with pytest.raises(HubError, match=rf"answered {status}; the address is https://hub\.example"):
        check_status(HUB, status, {})


@pytest.mark.parametrize(
    ("status", "code", "text", "without", "with_token"),
    [
        (401, "GatedRepo", "restricted", "set HF_TOKEN", "does not help"),
        (403, "GatedRepo", "restricted", "accept its terms", "accept its terms"),
        (401, "RepoNotFound", "no such repository, or no access", "set HF_TOKEN", "does not help"),
        (404, "RepoNotFound", "no such repository", "check the name", "does not help"),
        (404, "RevisionNotFound", "no such revision", "", ""),
        (404, "EntryNotFound", "no such file", "", ""),
        (401, "", "no access|answered 401", "set HF_TOKEN", "does not help"),
        (403, "", "answered 403", "set HF_TOKEN", "does not help"),
        (404, "", "answered 404", "check the name", "check the name"),
    ],
)
def test_access(status: int, code: str, text: str, without: str, with_token: str) -> None:
    for asked, hint in ((HUB, without), (KNOWN, with_token)):
        with pytest.raises(HubError, match=text) as e:
            check_status(asked, status, {"x-error-code": code})
        assert hint in (e.value.hint or "")


def test_the_hubs_own_words_are_passed_on() -> None:
    with pytest.raises(HubError, match="403, 'Access to this resource is disabled"):
        check_status(KNOWN, 403, {"x-error-message": "Access to this resource is disabled."})


def test_a_proxy_that_refuses_with_a_page_of_its_own() -> None:
    with pytest.raises(HubError, match="403 with a web page, which may be a proxy's"):
        check_status(HUB, 403, {"content-type": "text/html; charset=utf-8"})


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_storage_host_that_refuses_is_asked_for_by_a_new_address(status: int) -> None:
    """Signed addresses grow old, and copies are late: the hub's next redirect may lead elsewhere."""
    with pytest.raises(AgainError, match=f"answered {status} from its storage") as e:
        check_status(STORAGE, status, {"x-error-code": "RepoNotFound"})
    assert e.value.tries < LOGIN_TRIES


def test_a_proxy_that_wants_a_login() -> None:
    with pytest.raises(HubError, match="proxy asks for a login") as e:
        check_status(HUB, 407, {})
    assert "user:password@host" in str(e.value)


def test_a_network_that_wants_a_login() -> None:
    with pytest.raises(AgainError, match="login page"):
        check_status(HUB, 511, {})


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry_after": "8"}, 8),
        ({"retry_after": " 120 "}, 120),
        ({"retry_after": "1.5"}, 1.5),
        ({"retry_after": "0"}, 0),
        ({"retry_after": "-5"}, 0),
        ({"retry_after": "soon"}, 0),
        ({"retry_after": "nan"}, 0),
        ({"retry_after": "inf"}, 0),
        ({"retry_after": "9" * 400}, 0),
        ({"retry_after": formatdate(NOW + 12, usegmt=True), "date": DATE}, 12),
        ({"retry_after": "Tuesday, 14-Nov-23 22:13:32 GMT", "date": DATE}, 12),
        ({"retry_after": "Tue Nov 14 22:13:32 2023", "date": DATE}, 12),
        ({"retry_after": formatdate(NOW - 12, usegmt=True), "date": DATE}, 0),
        ({"retry_after": "Tue, 99 Nov 2023 22:13:32 GMT"}, 0),
        ({"ratelimit": '"api";r=0;t=55'}, 55),
        ({"ratelimit": '"api";r=12;t=55'}, 0),
        ({"ratelimit": '"api";r=9;t=200, "resolvers";r=0;t=20'}, 20),
        ({"ratelimit": "limit=100, remaining=0, reset=50"}, 0),
        ({"ratelimit": "limit=100;remaining=0;reset=50"}, 50),
        ({"ratelimit": f"r={'0' * 5000};t={'9' * 5000}"}, 0),
        ({"ratelimit_remaining": "0", "ratelimit_reset": "7"}, 7),
        ({"ratelimit_remaining": "3", "ratelimit_reset": "7"}, 0),
        ({"x_ratelimit_reset": "7"}, 7),
        ({"x_rate_limit_reset": "7"}, 7),
        ({"x_ratelimit_remaining": "0", "x_ratelimit_reset": str(NOW + 30), "date": DATE}, 30),
        ({"x_ratelimit_remaining": "0", "x_ratelimit_reset": str((NOW + 30) * 1000), "date": DATE}, 30),
        ({"retry_after": "3", "ratelimit": '"api";r=0;t=55'}, 3),
    ],
    ids=str,
)
def test_waits(headers: dict[str, str], seconds: float) -> None:
    assert wish(429, **headers) == pytest.approx(seconds)
    assert wish(503, **headers) == pytest.approx(seconds)


def test_a_date_without_the_servers_clock_is_held_against_this_one() -> None:
    assert 50 < wish(503, retry_after=formatdate(time.time() + 60, usegmt=True)) < 62


def test_rate_limits_are_no_reason_for_other_faults() -> None:
    assert wish(500, ratelimit='"api";r=0;t=55') == 0


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_header_is_a_wait(value: str, date: str) -> None:
    assert (
        0 <= wish(429, retry_after=value, date=date, ratelimit=value, x_ratelimit_reset=value) < float("inf")
    )


@pytest.mark.parametrize(
    ("headers", "packed"),
    [
        ({}, False),
        ({"content-encoding": ""}, False),
        ({"content-encoding": "Identity"}, False),
        ({"content-encoding": "GZIP"}, True),
        ({"content-encoding": "x-gzip"}, True),
        ({"content-encoding": "deflate"}, True),
        ({"content-encoding": "identity, gzip"}, True),
    ],
)
def test_codings(headers: dict[str, str], packed: bool) -> None:
    assert check_coding(HUB, headers) is packed


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, br", "compress", "aes128gcm", "\x1b[2J"])
def test_codings_that_cannot_be_undone(coding: str) -> None:
    with pytest.raises(HubError, match="Content-Encoding") as e:
        check_coding(HUB, {"content-encoding": coding})
    assert "\x1b" not in str(e.value) and "NO_PROXY" in str(e.value)


@pytest.mark.parametrize(
    ("content_range", "start"),
    [("bytes 10-99/100", 10), ("bytes 10-19/100", 10), ("bytes 10-99/*", 10), ("bytes  10-10/100", 10)],
)
def test_parts(content_range: str, start: int) -> None:
    assert body_start(HUB, 206, {"content-range": content_range}, 10, 100) == start


@pytest.mark.parametrize(
    "content_range",
    [
        "",
        "bytes 0-99/100",
        "bytes 11-99/100",
        "bytes 10-9/100",
        "bytes */100",
        "items 10-99/100",
        "bytes 10-99/101",
        f"bytes 10-99/{'9' * 5000}",
        "10-99",
    ],
)
def test_parts_that_were_not_asked_for(content_range: str) -> None:
    with pytest.raises(RangeError):
        body_start(HUB, 206, {"content-range": content_range}, 10, 100)


@pytest.mark.parametrize(
    ("text", "length"), [("0", 0), ("12", 12), ("", None), ("-1", None), ("1e3", None), ("9" * 5000, None)]
)
def test_stated_lengths(text: str, length: int | None) -> None:
    assert content_length({"content-length": text}) == length


def test_a_server_without_ranges_sends_the_whole_file() -> None:
    assert body_start(HUB, 200, {}, 10, 100) == 0


def test_a_range_that_is_not_there() -> None:
    with pytest.raises(RangeError):
        check_status(STORAGE, 416, {"content-range": "bytes */100"})


PAGES = [
    b"<!DOCTYPE html><html>",
    b"\n  <HTML>",
    b"\xef\xbb\xbf<!doctype HTML>",
    b"<?xml version='1.0'?><html>",
    b"<script>location='/login'</script>",
]


@pytest.mark.parametrize("head", PAGES)
@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream", ""])
def test_web_pages(head: bytes, kind: str) -> None:
    with pytest.raises(AgainError, match="web page"):
        check_body(HUB, {"content-type": kind}, head)


@pytest.mark.parametrize(
    "head",
    [b"{}", b'{"a": "<html>"}', b"GGUF", b"\x40\0\0\0\0\0\0\0{", b"{% if a < b %}", b"<|im_start|>", b""],
)
def test_files_that_are_no_web_pages(head: bytes) -> None:
    check_body(HUB, {"content-type": "application/octet-stream"}, head)
    if not head.startswith(b"<"):
        check_body(HUB, {"content-type": "text/html"}, head)
