"""What is asked of the hub: a repository at one commit, byte ranges, and whole files that count once verified.

Requests go through huggingface_hub's session, so that its token, endpoint and offline settings hold. What fails and
may pass is asked for again; what arrives is held against the size and the hash that the hub itself states. Nothing
from a repository is ever executed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from ..errors import HubError
from . import listing, settings
from .endpoint import parse_endpoint, shown
from .patience import AgainError, Patience
from .repository import Remote, Repository
from .session import Line, knock
from .transfer import Transfer

log = logging.getLogger(__name__)


class Hub:
    """A hub at an address (default: HF_ENDPOINT's, else huggingface.co). Safe for several threads.

    `pause` is the first pause between attempts, in seconds. `notify` is handed a line whenever a wait becomes long;
    by default that is a warning of Python's logging, which reaches stderr. Setting `stop` ends all transfers. Raises
    HubError where the address is none.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        pause: float = 1.0,
        notify: Callable[[str], None] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self.stop = stop or threading.Event()
        self.notify = notify or log.warning
        self._line = Line(
            parse_endpoint(endpoint or settings.address()), Patience(pause, self.stop, self.notify)
        )

    def resolve(self, name: str, revision: str | None = None) -> Repository:
        """Fix a branch, tag or commit (default: the main branch) to one commit and list its files; HubError."""
        return listing.resolve(self._line, name, revision)

    def read(self, repository: Repository, remote: Remote, start: int, stop: int) -> bytes:
        """Bytes start to stop of a remote file; HubError where they cannot be had."""
        return Transfer(self._line, repository, remote).read(start, stop)

    def download(self, repository: Repository, remote: Remote, target: Path) -> None:
        """Fetch a whole file to `target`, continuing what an earlier attempt left; it appears only once verified.

        Raises HubError, also where the disk cannot take the file.
        """
        Transfer(self._line, repository, remote).download(target)

    def ping(self, seconds: float) -> str:
        """Ask once whether anything answers at the hub's address; the address, without secrets. Raises HubError."""
        where = shown(self._line.endpoint.url)
        try:
            knock(self._line, where, seconds)
        except AgainError as e:
            raise HubError(e.problem, file=where, hint=e.hint) from None
        return where
