"""The hub's address and the secrets that belong to it: what is sent, to whom, and what may be shown.

A token or a password goes to the endpoint's own scheme, host and port, and to nobody else. Errors show the address
without user name, password, path and query, since the queries of storage hosts hold signatures.
"""

from __future__ import annotations

import base64
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from ..errors import HubError

_PORTS = {"http": 80, "https": 443}
_SENDABLE = re.compile(r"[\x21-\x7e]+(?: [\x21-\x7e]+)*")
_SECRETS = re.compile(r"//[^/\s'\"<>]*@")
_TOKENS = re.compile(r"\b(?:hf_|api_org_)\w{8,}")


@dataclass(frozen=True)
class Endpoint:
    """The address that files are asked of, without user name and password; these stand in `password`, encoded."""

    url: str
    password: str | None = field(default=None, repr=False)

    def headers(self, url: str) -> dict[str, str]:
        """The headers of a request to `url`: who asks, and the credentials if `url` is the endpoint's.

        Raises HubError where the token holds characters that no header can hold; the message does not show it.
        """
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        trusted = origin(url) == origin(self.url)
        if not trusted or self.password is not None:
            headers = dict(build_hf_headers(token=False))
            if trusted:
                headers["authorization"] = f"Basic {self.password}"
            return headers
        headers = dict(build_hf_headers())
        for name, value in headers.items():
            if not _SENDABLE.fullmatch(value):
                what = "the token" if name.lower() == "authorization" else f"the header {name}"
                hint = "copy the token again: HF_TOKEN, or what `hf auth login` stored, must be plain ASCII letters"
                raise HubError(
                    f"{what} holds characters that cannot be sent in a header of HTTP",
                    file=shown(self.url),
                    hint=hint if what == "the token" else "check HF_HUB_USER_AGENT_ORIGIN",
                )
        return headers

    def without_secrets(self, said: str) -> str:
        """What a server said, without the credentials that it was sent: some servers repeat them."""
        sent = self.headers(self.url).get("authorization", "").partition(" ")[2]
        secrets = [sent]
        if self.password is not None:
            pair = base64.b64decode(self.password).decode("utf-8", "surrogateescape")
            secrets += [pair, pair.partition(":")[2]]
        for secret in filter(None, secrets):
            said = said.replace(secret, "…")
        return redacted(said)

    @property
    def has_secret(self) -> bool:
        """Whether requests to the endpoint carry a token or a password."""
        return "authorization" in self.headers(self.url)


def parse_endpoint(text: str) -> Endpoint:
    """An endpoint from HF_ENDPOINT's text, which may hold a user name and a password. Raises HubError."""
    parts = _split(text.strip())
    if parts is None or parts.scheme not in _PORTS or not parts.hostname or parts.query or parts.fragment:
        raise HubError(
            "HF_ENDPOINT is not the address of a hub",
            file=redacted(text),
            hint="it has the form https://host or https://host:port; unset it to use https://huggingface.co",
        )
    place = parts.netloc.rpartition("@")[2]
    url = f"{parts.scheme}://{place}{parts.path.rstrip('/')}"
    if parts.username is None:
        return Endpoint(url)
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return Endpoint(url, base64.b64encode(pair.encode("utf-8", "surrogateescape")).decode("ascii"))


def origin(url: str) -> tuple[str, str, int]:
    """(scheme, host, port) of an address: what a secret is bound to. An address that is none equals no other."""
    parts = _split(url)
    if parts is None or parts.scheme not in _PORTS or not parts.hostname:
        return "", url, -1
    return parts.scheme, parts.hostname.rstrip("."), parts.port or _PORTS[parts.scheme]


def shown(url: str) -> str:
    """The address of a server as errors show it: scheme, host and port."""
    parts = _split(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts and parts.netloc else redacted(url)


def redacted(text: object) -> str:
    """A text without the passwords of addresses and without tokens."""
    return _TOKENS.sub("…", _SECRETS.sub("//", str(text)))


def proxy_of(url: str) -> str | None:
    """The proxy, as errors show it, through which the environment sends requests to `url`."""
    parts = _split(url)
    proxies: Mapping[str, Any] = urllib.request.getproxies()
    if parts is None or not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return None
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return shown(proxy if "://" in proxy else f"http://{proxy}") if proxy else None


def _split(url: str) -> SplitResult | None:
    """The parts of an address; None where programs could take it apart differently, or not at all."""
    if "\\" in url or not url.isprintable() or " " in url:
        return None
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts
