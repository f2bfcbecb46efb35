"""Secrets go to the endpoint and to nobody else, and are shown nowhere."""

from __future__ import annotations

import base64

import pytest
from mq_quant.formats.errors import HubError
from mq_quant.formats.hub.endpoint import Endpoint, origin, parse_endpoint, proxy_of, redacted, shown

pytestmark = pytest.mark.usefixtures("isolated")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://hub.example", "https://hub.example"),
        (" https://hub.example/ ", "https://hub.example"),
        ("http://127.0.0.1:8080/hf/", "http://127.0.0.1:8080/hf"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("https://worker:open%20sesame@hub.example:81", "https://hub.example:81"),
    ],
)
def test_addresses(text: str, url: str) -> None:
    assert parse_endpoint(text).url == url


@pytest.mark.parametrize(
    "text",
    [
        "hub.example",
        "ftp://sesame@hub.example",
        "https://",
        "https://a:sesame@",
        "http://a:sesame@h:port",
        "http://a:sesame@[::1",
        "https://h/?x=1",
        "https://h h",
        "https://h\\@sesame@x",
        "https://h\x1b[2J",
        "not a url",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(HubError, match="not the address of a hub") as e:
        parse_endpoint(text)
    assert "sesame" not in str(e.value) and "https://host" in str(e.value)


def test_a_password_goes_to_the_endpoint_alone() -> None:
    endpoint = parse_endpoint("https://worker:open%20sesame@hub.example")
    sent = endpoint.headers("https://hub.example/a/b")["authorization"]
    assert base64.b64decode(sent.removeprefix("Basic ")) == b"worker:open sesame"
    assert "authorization" not in endpoint.headers("https://storage.example/a/b")
    assert "sesame" not in repr(endpoint) and sent[6:] not in repr(endpoint)


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://hub.example/x", True),
        ("https://HUB.example:443/x", True),
        ("https://hub.example:8443/x", False),
        ("http://hub.example/x", False),
        ("https://cdn.hub.example/x", False),
        ("https://hub.example.evil.example/x", False),
        ("https://hub.example@evil.example/x", False),
        ("https://evil.example\\@hub.example/x", False),
        ("https://hub.example:99999/x", False),
    ],
)
def test_the_token_goes_to_scheme_host_and_port(
    url: str, sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_sesame")
    assert ("authorization" in Endpoint("https://hub.example").headers(url)) is sent


@pytest.mark.parametrize("token", ["\u201chf_sesame\u201d", "hf_\u0455esame", "hf_ses\x00ame", "hf_ses\name"])
def test_a_token_that_no_header_can_hold(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: token)
    with pytest.raises(HubError, match="the token holds characters") as e:
        Endpoint("https://hub.example").headers("https://hub.example")
    assert "ame" not in str(e.value).replace("name", "") and "HF_TOKEN" in str(e.value)


def test_an_agent_that_no_header_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_USER_AGENT_ORIGIN", "caf\u00e9")
    with pytest.raises(HubError, match="user-agent"):
        Endpoint("https://hub.example").headers("https://hub.example")


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("cannot reach http://a:sesame@h:1/x", "cannot reach http://h:1/x"),
        ("socks5://sesame@h", "socks5://h"),
        ("Bearer hf_sesamesesame!", "Bearer …!"),
        ("see https://huggingface.co/docs", "see https://huggingface.co/docs"),
    ],
)
def test_redaction(text: str, safe: str) -> None:
    assert redacted(ValueError(text)) == safe


def test_only_host_and_port_are_shown() -> None:
    assert shown("https://u:p@h:81/path?X-Amz-Signature=sesame") == "https://h:81"
    assert "sesame" not in shown("//a:sesame@h:port/")


@pytest.mark.parametrize("text", ["", "http:", "mailto:a@b", "http://[", "//h"])
def test_what_has_no_origin_equals_nothing(text: str) -> None:
    assert origin(text)[0] == ""
    assert origin(text) != origin("https://hub.example")


def test_the_proxy_of_the_environment_is_shown_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "NO_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://worker:sesame@proxy.example:3128")
    assert proxy_of("https://hub.example") == "http://proxy.example:3128"
    assert proxy_of("http://hub.example") is None
    monkeypatch.setenv("NO_PROXY", "hub.example")
    assert proxy_of("https://hub.example") is None
    monkeypatch.setenv("ALL_PROXY", "proxy.example")
    assert proxy_of("http://other.example") == "http://proxy.example"


@pytest.mark.parametrize(
    ("address", "token", "said"),
    [
        ("https://hub.example", "plainsesame", "the token plainsesame is unknown"),
        ("https://hub.example", "hf_sesamesesame", "Bearer hf_sesamesesame"),
        ("https://worker:sesame@hub.example", None, "no user with sesame or d29ya2VyOnNlc2FtZQ=="),
    ],
)
def test_a_server_that_repeats_a_secret_is_not_quoted(
    address: str, token: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    shown = parse_endpoint(address).without_secrets(said)
    assert "sesame" not in shown and "d29y" not in shown and "…" in shown
