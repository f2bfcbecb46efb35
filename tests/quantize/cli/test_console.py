"""How a command ends that Ctrl-C reaches, and how sizes and tables read."""

from __future__ import annotations

import pytest
import typer
from mq_quant.quantize.cli.console import INTERRUPTED, gigabytes, resumable, table


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


@pytest.mark.parametrize(
    ("count", "text"), [(86_180_388_864, "86.2 GB"), (2_037_760, "2.0 MB"), (1500, "1.5 kB"), (7, "7 B")]
)
def test_sizes_read_well(count: int, text: str) -> None:
    assert gigabytes(count) == text


def test_tables_align_numbers_to_the_right() -> None:
    assert table(("name", "n"), [("a", 5), ("long", 123)]) == "name    n\na       5\nlong  123"
