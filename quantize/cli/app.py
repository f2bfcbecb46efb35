"""The `mq-quant` command: one app, the way errors are shown, and the exit codes.

Exit code 2 means bad input, 1 a failed check or a fault of the machine, 130 an interruption. Command modules import
what they need when they run, so that `--help` is instant.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer
from typer.main import get_command

from . import build as cli_build
from . import calibrate as cli_calibrate
from . import inspect as cli_inspect
from . import tune as cli_tune
from . import verify as cli_verify
from .console import INTERRUPTED, note
from .guard import as_error, guarded, usage_of
from .streams import READER_GONE, prepare, silence

DEBUG = "--debug"
BAD_INPUT = 2

app = typer.Typer(
    name="mq-quant",
    help="Turns FP8 checkpoints of MiniMax-M2 into HFQ files for the hipfire engine, and judges the result.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_MODULES = (cli_build, cli_calibrate, cli_tune, cli_inspect, cli_verify)
_COMMANDS = {name: command for module in _MODULES for name, command in module.COMMANDS.items()}
_ORDER = (
    "tiers", "plan", "build", "calibrate", "tune", "verify", "inspect", "diff", "reproduce", "compare-hidden", "doctor",
)  # fmt: skip
"""As the help lists them: in the order in which a newcomer meets them."""


def _with_warnings(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with what modules warn of shown while it runs."""

    @functools.wraps(command)
    def run(*args: object, **options: object) -> None:
        from .warnings_shown import warnings_shown

        with warnings_shown():
            command(*args, **options)

    return run


for name in _ORDER:
    app.command(name)(guarded(_with_warnings(_COMMANDS[name])))


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mq-quant {version('mq-quant')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show the traceback of an error. May stand anywhere on the line.")
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; exits with its code."""
    prepare()
    args = list(sys.argv[1:] if argv is None else argv)
    debug = DEBUG in args
    try:
        command = get_command(app)
        code = command.main(
            [arg for arg in args if arg != DEBUG], prog_name="mq-quant", standalone_mode=False
        )
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(INTERRUPTED)
    except SystemExit as e:
        if not isinstance(e.__context__, BrokenPipeError):
            raise
        silence(sys.stdout)  # the reader of a help page has left: the pages are typer's, and so is this exit
        sys.exit(READER_GONE)
    except BaseException as e:
        if (usage := usage_of(e)) is not None:
            note(usage)
            sys.exit(BAD_INPUT)
        error = as_error(e)
        if error is None or debug:
            raise
        note(f"error: {error}")
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)
