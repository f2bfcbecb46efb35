"""From rotated groups to codes and levels: pure numeric kernels, compiled with numba. Imports formats only.

The rounding kernels work on *lanes*: blocks [256, 16] holding one group of 16 rows, row index last, so that every
inner loop runs over the 16 rows. No sum ever crosses lanes, hence the result does not depend on the width of the
machine's vectors.
"""

import hashlib
import os
from pathlib import Path

from numba import config


def _keep_caches_apart() -> None:
    """Keep compiled code in a folder named after these sources.

    A compiled function holds what it calls, but numba looks only at its own file for changes: after an upgrade, old
    code could be found for new sources, and write other bytes. NUMBA_CACHE_DIR, where set, is left to the user.
    """
    if "NUMBA_CACHE_DIR" in os.environ:
        return
    sources = hashlib.sha256()
    for module in sorted(Path(__file__).parent.rglob("*.py")):
        sources.update(module.read_bytes())
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "mq-quant" / f"numba-{sources.hexdigest()[:16]}"
    setattr(config, "CACHE_DIR", str(folder))  # noqa: B010


_keep_caches_apart()
