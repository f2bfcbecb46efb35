"""The last guard of a command: whatever exception leaves it becomes one error with a message for the user."""

from __future__ import annotations

import errno
import functools
import io
from collections.abc import Callable

import typer

from ...formats.errors import MqError
from .start import INTERRUPTED

SAID = 300
"""Characters that are shown of what a foreign exception says."""
REPORT = "this is a fault of mq-quant or of a library it uses: --debug shows where, please report it"
_NOT_MAPPED = ("failed to map segment from shared object", "cannot allocate memory")
"""What the system says where a library does not get the memory to be loaded."""
_PATHS = {
    errno.ENAMETOOLONG: ("its name is too long for this file system", "check the path"),
    errno.EACCES: ("permission denied", "check the permissions of it and of the folders above it"),
    errno.EROFS: ("its file system is read-only", "name another place"),
}
"""What the system says of a path itself: the fault of who gave it, and not of the machine."""
_NOT_ERRORS = (typer.Exit, typer.Abort, typer.BadParameter, SystemExit, GeneratorExit)


class MachineError(MqError):
    """The machine could not do what was asked: its disk, its memory or its system calls failed."""

    exit_code = 1


class PathError(MqError):
    """The system does not let this user have a file or folder of this name."""


class FaultError(MqError):
    """An exception that nobody foresaw."""

    exit_code = 1


class UsageError(MqError):
    """Options or arguments that a command does not take; `shown` is what typer says of it, the usage included."""

    def __init__(self, problem: str, shown: str) -> None:
        self.shown = shown
        super().__init__(problem, hint="--help lists what the command takes")


class InterruptError(MqError):
    """Ctrl-C ended the command; the hint says how it is continued."""

    exit_code = INTERRUPTED

    def __init__(self, advice: str | None = None) -> None:
        super().__init__("interrupted", hint=advice)


def as_error(exception: BaseException) -> MqError | None:
    """The error to show for an exception; None for those that are no errors, such as exits and usage messages.

    Extensions written in Rust raise exceptions that are no `Exception`, so every BaseException is looked at.
    """
    if isinstance(exception, MqError):
        return exception
    if isinstance(exception, _NOT_ERRORS):
        return None
    if isinstance(exception, KeyboardInterrupt):
        return InterruptError()
    no_memory = isinstance(exception, ImportError) and any(each in str(exception) for each in _NOT_MAPPED)
    if isinstance(exception, MemoryError) or no_memory or type(exception).__name__ == "OutOfMemoryError":
        return MachineError("out of memory", hint="try fewer --jobs")
    said = _first_line(exception)
    if isinstance(exception, OSError):
        names = [str(name) for name in (exception.filename, exception.filename2) if name is not None]
        words = _PATHS.get(exception.errno or 0)
        if words is not None and names:
            return PathError(words[0], file=" -> ".join(names), hint=words[1])
        problem = exception.strerror or said or type(exception).__name__
        return MachineError(problem, file=" -> ".join(names) or None, hint="--debug shows where")
    return FaultError(f"{type(exception).__name__}{': ' if said else ''}{said}", hint=REPORT)


def _first_line(exception: BaseException) -> str:
    """What an exception says, short and without passwords and tokens: libraries put addresses into their messages."""
    try:
        from ...formats.hub.endpoint import redacted
    except Exception:  # the fault that is told keeps modules from being loaded, too
        return ""
    return redacted(str(exception).strip().partition("\n")[0])[:SAID]


def usage_of(exception: BaseException) -> UsageError | None:
    """What typer has to say of options and arguments that it does not take; None for other exceptions."""
    show, message = getattr(exception, "show", None), getattr(exception, "format_message", None)
    if isinstance(exception, MqError) or not (callable(show) and callable(message)):
        return None
    text = io.StringIO()
    show(file=text)
    said, shown = (part.rstrip().replace("Value error, ", "") for part in (str(message()), text.getvalue()))
    return UsageError(said, shown)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command, raising nothing but MqError and what ends a command on purpose.

    The guard stands around the command itself, because typer takes every broken pipe, also that of a connection to the
    hub, for a reader who has left, and would end without a word.
    """

    @functools.wraps(command)
    def run(*args: object, **options: object) -> None:
        try:
            command(*args, **options)
        except BaseException as e:
            error = as_error(e)
            if error is None or error is e:
                raise
            raise error from e

    return run
