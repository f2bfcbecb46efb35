"""What the environment says about the hub; every variable that the hub's shelf reads is read here.

huggingface_hub reads its variables once, when it is imported; here they are read when they are needed.
"""

from __future__ import annotations

import os
from pathlib import Path

TRUE = ("1", "ON", "TRUE", "YES")


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network: 1, true, yes or on, in letters of either case."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in TRUE


def address() -> str:
    """The address of the hub, as HF_ENDPOINT gives it (it may hold a password), or the public one."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").strip() or str(constants.ENDPOINT)


def cache_folder() -> Path | None:
    """The folder of huggingface_hub's cache (HF_HUB_CACHE, or `hub` in HF_HOME); None for a user without a home."""
    from huggingface_hub import constants

    path = Path(constants.HF_HUB_CACHE)
    return None if path.parts[:1] == ("~",) else path


def read_seconds() -> float:
    """Seconds that one read from a connection may take: HF_HUB_DOWNLOAD_TIMEOUT, at least one."""
    from huggingface_hub import constants

    return max(float(constants.HF_HUB_DOWNLOAD_TIMEOUT), 1.0)
