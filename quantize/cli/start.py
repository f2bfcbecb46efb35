"""Where the command `mq-quant` begins: Ctrl-C that comes while modules are loaded ends it as at any other moment."""

from __future__ import annotations

import sys

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""


def main() -> None:
    """Run one command; exits with its code."""
    try:
        from .app import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
