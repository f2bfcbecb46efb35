"""The `mq-quant` command: one app, the way errors are shown, and the exit codes.

Exit code 2 means bad input, 1 a failed check or a fault of the machine, 130 an interruption. Command modules import
what they need when they run, so that `--help` is instant.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Annotated

import typer
from typer.main import get_command

from ...formats.errors import MqError
from ...formats.machine import leave_out_foreign_settings
from . import build as cli_build
from . import calibrate as cli_calibrate
from . import card as cli_card
from . import diff as cli_diff
from . import evaluate as cli_evaluate
from . import inspect as cli_inspect
from . import kit as cli_kit
from . import measure as cli_measure
from . import merge as cli_merge
from . import plan as cli_plan
from . import publish as cli_publish
from . import recipes as cli_recipes
from . import regenerate as cli_regenerate
from . import tune as cli_tune
from . import verify as cli_verify
from .console import complain, unprintable
from .events import events_on_stderr
from .guard import InterruptError, as_error, guarded, usage_of
from .streams import READER_GONE, prepare, silence

DEBUG, EVENTS, JSON = "--debug", "--json-events", "--json"

_MAY_BE_EMPTY = ("--filter", "--prompt", "--message")
"""Options whose value is a text that may be empty."""

app = typer.Typer(
    name="mq-quant",
    help="Turns FP8 checkpoints of MiniMax-M2 into HFQ files for the hipfire engine, and judges the result.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_MODULES = (
    cli_build,
    cli_plan,
    cli_calibrate,
    cli_merge,
    cli_tune,
    cli_evaluate,
    cli_measure,
    cli_card,
    cli_kit,
    cli_inspect,
    cli_diff,
    cli_publish,
    cli_recipes,
    cli_regenerate,
    cli_verify,
)
_COMMANDS = {name: command for module in _MODULES for name, command in module.COMMANDS.items()}
_ORDER = (
    "tiers", "recipes", "plan", "build", "merge", "calibrate", "tune", "measure", "verify", "evaluate", "card",
    "publish", "inspect", "diff", "reproduce", "regenerate", "compare-hidden", "kit", "doctor",
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
    json_events: Annotated[
        bool,
        typer.Option(
            EVENTS,
            help="Write progress, notes and errors to stderr as JSON, one object a line. May stand anywhere "
            "on the command line.",
        ),
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; exits with its code."""
    prepare()
    leave_out_foreign_settings()
    args = list(sys.argv[1:] if argv is None else argv)
    with events_on_stderr() if EVENTS in args else nullcontext():
        error = _run([arg for arg in args if arg not in (DEBUG, EVENTS)], DEBUG in args)
        if error is not None:
            complain(error, JSON in args)
            sys.exit(error.exit_code)


def _check_empty(args: Sequence[str]) -> None:
    """MqError where an argument is empty, which would be taken for the folder here or for an option not given."""
    for before, arg in pairwise(("", *args)):
        name, given, value = arg.partition("=")
        if not arg and before not in _MAY_BE_EMPTY:
            what = before if before.startswith("-") else "an argument"
        elif given and not value and name.startswith("--") and name not in _MAY_BE_EMPTY:
            what = name
        else:
            continue
        raise MqError(f"{what} is empty", hint="is a variable of your shell not set?")


def _run(args: list[str], debug: bool) -> MqError | None:
    """Run one command; the error that ended it. Exits with the code of one that ended in another way.

    Commands are guarded: an OSError that comes here is of a page of help, which typer prints.
    """
    try:
        _check_empty(args)
        code = get_command(app).main(args, prog_name="mq-quant", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return InterruptError()
    except SystemExit as e:
        if not isinstance(e.__context__, BrokenPipeError):
            raise
        silence(sys.stdout)  # the reader of a help page has left: the pages are typer's, and so is this exit
        sys.exit(READER_GONE)
    except BaseException as e:
        if (usage := usage_of(e)) is not None:
            return usage
        error = unprintable("the page", e) if isinstance(e, OSError) else as_error(e)
        if error is None or (debug and not isinstance(error, InterruptError)):
            raise
        return error
    sys.exit(code if isinstance(code, int) else 0)
