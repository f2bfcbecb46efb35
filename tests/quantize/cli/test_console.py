"""How a command ends that Ctrl-C reaches."""

from __future__ import annotations

import pytest
import typer
from mq_quant.quantize.cli.console import INTERRUPTED, resumable


def interrupted_lock() -> None:
    """As threading does where Ctrl-C comes while a condition lets go of its lock."""
    try:
        raise KeyboardInterrupt
    finally:
        raise RuntimeError("cannot release un-acquired lock")


def test_ctrl_c_ends_with_advice_and_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as exit, resumable("go on"):
        raise KeyboardInterrupt
    assert exit.value.exit_code == INTERRUPTED
    assert capsys.readouterr().err == "interrupted; go on\n"


def test_so_does_an_error_that_it_leads_to_in_a_lock(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as exit, resumable("go on"):
        interrupted_lock()
    assert exit.value.exit_code == INTERRUPTED
    assert capsys.readouterr().err == "interrupted; go on\n"


@pytest.mark.parametrize("error", [RuntimeError("alone"), ValueError("other")])
def test_other_errors_stay(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)) as raised, resumable("go on"):
        try:
            raise OSError("before")
        except OSError:
            raise error  # noqa: B904
    assert raised.value is error
    assert capsys.readouterr().err == ""
