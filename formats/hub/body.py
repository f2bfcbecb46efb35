"""The body of an answer as it comes: unpacked, watched for slowness, and told of while it is waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from .answers import Asked, check_body, content_length
from .patience import AgainError, Patience

SLOW_SECONDS, SLOW_BYTES = 30.0, 64 << 10
"""A body of which fewer bytes than SLOW_BYTES came in SLOW_SECONDS counts as a dropped connection."""
TELL_SECONDS = 3.0
"""A body of which fewer bytes than SLOW_BYTES came in these seconds is spoken of."""
SHORT_BODY, DRAIN_SECONDS = 64 << 10, 1.0
"""The body of a redirect is read, so that the connection can be used again, if it is no longer than this."""


@dataclass
class _Flow:
    """A body as its watcher sees it: the bytes that came, and whether its reader waits for more."""

    came: int = 0
    waiting: bool = True


def watched(
    response: Any, asked: Asked, headers: Mapping[str, str], packed: bool, patience: Patience
) -> Generator[bytes, None, None]:
    """The body, unpacked; close the iterator to end the watch.

    Raises AgainError where the body is a web page, or comes so slowly that the connection counts as dropped.
    """
    flow, ended = _Flow(), threading.Event()
    threading.Thread(target=_watch, args=(flow, ended, asked, patience), name="hub", daemon=True).start()
    began, before, head = time.monotonic(), 0, True
    try:
        for chunk in response.iter_bytes() if packed else response.iter_raw():
            if head and chunk:
                check_body(asked, headers, chunk[:512])
                head = False
            flow.came, flow.waiting = flow.came + len(chunk), False
            yield chunk
            flow.waiting = True
            if (now := time.monotonic()) - began > SLOW_SECONDS:
                if (came := flow.came - before) < SLOW_BYTES:
                    raise AgainError(f"only {came} bytes came in {now - began:.0f} s", host=asked.host)
                began, before = now, flow.came
    finally:
        ended.set()


def _watch(flow: _Flow, ended: threading.Event, asked: Asked, patience: Patience) -> None:
    """Speak of a body that hardly comes, as often as `patience` lets it, until it has ended."""
    before = 0
    while not ended.wait(TELL_SECONDS):
        came, before = flow.came - before, flow.came
        if flow.waiting and came < SLOW_BYTES:
            patience.say(
                f"{asked.what}: only {came} bytes came from {asked.host} in {TELL_SECONDS:.0f} s; waiting"
            )


def drain(response: Any, headers: Mapping[str, str]) -> None:
    """Read the short body of a redirect, so that the connection can be used again; a slow one is left alone."""
    length, began = content_length(headers), time.monotonic()
    if length is not None and length <= SHORT_BODY:
        for _ in response.iter_raw():
            if time.monotonic() - began > DRAIN_SECONDS:
                break
