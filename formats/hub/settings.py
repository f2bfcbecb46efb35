"""What the environment says about the hub; every variable that the hub's shelf reads is read here.

huggingface_hub reads its variables once, when it is imported; here they are read when they are needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import HubError
from ..machine import variable

PUBLIC = "https://huggingface.co"
TRUE = ("1", "ON", "TRUE", "YES")


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network: 1, true, yes or on, in letters of either case."""
    return bool(_library().HF_HUB_OFFLINE) or (variable("HF_HUB_OFFLINE") or "").strip().upper() in TRUE


def address() -> str:
    """The address of the hub, as HF_ENDPOINT gives it (it may hold a password), or the public one."""
    return named_address() or str(_library().ENDPOINT or PUBLIC)


def named_address() -> str:
    """What HF_ENDPOINT holds, nothing where it is not set."""
    return (variable("HF_ENDPOINT") or "").strip()


def cache_folder() -> Path | None:
    """The folder of huggingface_hub's cache (HF_HUB_CACHE, or `hub` in HF_HOME); None for a user without a home."""
    folder = str(_library().HF_HUB_CACHE)
    return None if not folder or Path(folder).parts[0] == "~" else Path(folder)


def read_seconds() -> float:
    """Seconds that one read from a connection may take: HF_HUB_DOWNLOAD_TIMEOUT, at least one."""
    return max(float(_library().HF_HUB_DOWNLOAD_TIMEOUT), 1.0)


def _library() -> Any:
    """huggingface_hub's constants, which it reads from the environment. HubError where a variable is no number."""
    try:
        from huggingface_hub import constants
    except ValueError as e:
        hint = "the variables HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT hold whole numbers of seconds"
        raise HubError(f"huggingface_hub cannot read its environment variables: {e}", hint=hint) from None
    return constants
