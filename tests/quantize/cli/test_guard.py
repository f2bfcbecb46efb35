"""Whatever a command raises becomes one error with an exit code; nothing foreign is shown as a traceback."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import typer
from mq_quant.formats.errors import HfqError, HfqKind, InUseError
from mq_quant.quantize.cli import app as app_module
from mq_quant.quantize.cli.guard import as_error, guarded


class PanicException(BaseException):
    """As extensions written in Rust raise it: no `Exception`."""


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


FOREIGN: list[tuple[BaseException, str]] = [
    (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum recursion depth exceeded"),
    (ValueError("could not broadcast\nsecond line"), "ValueError: could not broadcast"),
    (KeyError("name"), "KeyError: 'name'"),
    (AttributeError("/lib/libx.so: undefined symbol: hipMalloc"), "undefined symbol: hipMalloc"),
    (PanicException("index out of bounds"), "PanicException: index out of bounds"),
    (AssertionError(), "AssertionError"),
    (OSError(errno.ENOSPC, "No space left on device", "out.mq2"), "out.mq2: No space left on device"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
    (OSError("no number"), "no number"),
    (MemoryError(), "out of memory"),
    (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
    (ValueError("\x1b[2J"), r"ValueError: \x1b[2J"),
]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Gives the command `tiers` an exception to raise."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

    def set_up(error: BaseException) -> None:
        def command(json: bool = False) -> None:
            raise error

        app.registered_commands.clear()
        app.command("tiers")(guarded(command))
        app.callback()(lambda: None)
        monkeypatch.setattr(app_module, "app", app)

    return set_up


@pytest.mark.parametrize(("error", "said"), FOREIGN, ids=lambda value: type(value).__name__)
def test_a_foreign_exception_is_one_error_of_exit_code_1(
    error: BaseException,
    said: str,
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(error)
    with pytest.raises(SystemExit) as ended:
        app_module.main(["tiers"])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (1, "")
    assert err.startswith("error: ") and said in err and "Traceback" not in err


def test_debug_shows_where_it_came_from(failing: Callable[[BaseException], None]) -> None:
    cause = RecursionError("deep")
    failing(cause)
    with pytest.raises(Exception, match="RecursionError: deep") as raised:
        app_module.main(["tiers", "--debug"])
    assert raised.value.__cause__ is cause


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(KeyboardInterrupt(), 130, "interrupted\n"), (typer.Exit(3), 3, ""), (SystemExit(4), 4, "")],
)
def test_what_ends_a_command_on_purpose_stays_so(
    error: BaseException,
    code: int,
    said: str,
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(error)
    with pytest.raises(SystemExit) as ended:
        app_module.main(["tiers"])
    assert (ended.value.code, capsys.readouterr().err) == (code, said)


def test_under_json_an_error_is_one_object(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(HfqError("is broken\x1b", kind=HfqKind.VERSION, file="x.mq2", tensor="t", hint="look"))
    for line in (["tiers", "--json"], ["--json-events", "tiers"], ["tiers", "--json-events", "--json"]):
        with pytest.raises(SystemExit) as ended:
            app_module.main(line)
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (2, "")
        (said,) = err.splitlines()
        assert said.isprintable()
        assert json.loads(said) == {
            "event": "error", "code": "hfq.version", "problem": "is broken\x1b", "file": "x.mq2", "tensor": "t",
            "hint": "look", "exit_code": 2,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "code", "exit_code"),
    [
        (KeyboardInterrupt(), "interrupt", 130),
        (MemoryError(), "machine", 1),
        (ValueError("x"), "fault", 1),
        (InUseError("is in use"), "in_use", 2),
        (typer.BadParameter("no such folder"), "usage", 2),
    ],
)
def test_every_end_by_an_error_has_a_code(
    error: BaseException,
    code: str,
    exit_code: int,
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(error)
    with pytest.raises(SystemExit) as ended:
        app_module.main(["tiers", "--json-events"])
    said = json.loads(capsys.readouterr().err)
    assert (said["code"], said["exit_code"], ended.value.code) == (code, exit_code, exit_code)
    assert "Usage:" not in said["problem"]


def test_our_own_errors_pass_as_they_are() -> None:
    error: Any = HfqError("is broken", kind=HfqKind.VERSION, file="x")
    assert as_error(error) is error


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG, errno.EROFS])
def test_what_the_system_says_of_a_path_is_bad_input(number: int) -> None:
    error = as_error(OSError(number, "as the system says it", "given/name"))
    assert error is not None and error.exit_code == 2
    assert error.file == "given/name" and error.hint and "--debug" not in error.hint


def test_a_library_without_memory_to_be_loaded_is_out_of_memory() -> None:
    error = as_error(ImportError("libx.so: failed to map segment from shared object"))
    assert error is not None and error.problem == "out of memory"


def test_an_error_is_told_where_no_module_can_be_loaded_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mq_quant.formats.hub.endpoint", None)
    error = as_error(ValueError("says a token"))
    assert error is not None and error.problem == "ValueError"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (["verify", "a.mq2", "--source", ""], "--source"),
        (["build", "--tier", "mq2", "--source="], "--source"),
        (["build", "--tier", "mq2", "-o", ""], "-o"),
        (["inspect", ""], "an argument"),
    ],
)
def test_an_empty_argument_is_refused(
    line: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A variable of the shell that is not set would mean this folder, or an option that was not given."""
    with pytest.raises(SystemExit) as ended:
        app_module.main(line)
    assert ended.value.code == 2
    assert f"error: {named} is empty\n" in capsys.readouterr().err
