"""The `mq-quant` command: one app, the way errors are shown, and the exit codes.

Exit code 2 is bad input, 1 a failed check or a fault of the machine, 130 an interruption. Command modules are light to
import; what they need is imported when they run, so that `--help` is instant.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ...formats.errors import MqError
from . import build as cli_build
from . import calibrate as cli_calibrate
from . import inspect as cli_inspect
from . import verify as cli_verify
from .console import INTERRUPTED, note

DEBUG = "--debug"

app = typer.Typer(
    name="mq-quant",
    help="Turns MiniMax-M2 FP8 checkpoints into hipfire-native HFQ files, and judges the result.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (cli_build, cli_calibrate, cli_inspect, cli_verify):
    for name, command in module.COMMANDS.items():
        app.command(name)(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"mq-quant {version('mq-quant')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show tracebacks (accepted anywhere on the line).")
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; exits with its code."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = DEBUG in args
    try:
        app(args=[arg for arg in args if arg != DEBUG], prog_name="mq-quant")
    except (MqError, OSError, MemoryError) as e:
        if debug:
            raise
        note(f"error: {_message(e)}")
        sys.exit(e.exit_code if isinstance(e, MqError) else 1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _message(error: BaseException) -> str:
    if isinstance(error, MqError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory\n  try fewer --jobs"
    return f"{error} (--debug shows where)"
