"""What to do about an address that does not answer as the hub does: HF_ENDPOINT may have named it."""

from __future__ import annotations

from .endpoint import origin, shown
from .settings import PUBLIC, named_address


def about(url: str, otherwise: str) -> str:
    """The advice where `url` lies on the address that HF_ENDPOINT names: to correct the variable. Else `otherwise`."""
    named = named_address()
    if not named or origin(named) != origin(url):
        return otherwise
    return f"HF_ENDPOINT is {shown(named)}: correct it, or unset it to use {PUBLIC}; {otherwise}"
