"""Python's garbage collector beside threads that keep a device busy."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def short_collections() -> Iterator[None]:
    """In the whole process, the collector leaves alone what is there already.

    To look through all that torch and numba bring takes a tenth of a second, and no thread launches anything meanwhile.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
