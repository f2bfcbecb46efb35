"""Compilers are run with a place for their files, and what goes wrong is one error."""

from __future__ import annotations

import pytest
from mq_quant.formats.errors import BackendError
from mq_quant.kernels.runtime.command import run


def test_a_command_is_told_where_its_files_go(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/cleaned/away")
    said = run(("sh", "-c", 'echo "$TMPDIR $LC_ALL $EXTRA"'), "the shell", tmp_path, {"EXTRA": "more"})
    assert said == f"{tmp_path} C more\n"
    assert run(("sh", "-c", 'echo "$TMPDIR"'), "the shell") == "/cleaned/away\n"


def test_what_a_failing_command_said_is_shown_from_its_end():
    script = "{ yes warning | head -2000; printf 'the end\\377'; exit 3; } >&2"
    with pytest.raises(BackendError, match=r"^it does not compile:\n(.|\n)*the end�\n  by sh -c") as caught:
        run(("sh", "-c", script), "it does not compile")
    assert len(str(caught.value)) < 4500


@pytest.mark.parametrize("command", ["/no/such/program", "/", "a\0b"])
def test_a_program_that_cannot_be_run_is_named(command):
    with pytest.raises(BackendError, match="cannot be run"):
        run((command,), "the compiler")
