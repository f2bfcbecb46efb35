"""The command's first moment: an interruption while modules are loaded is one line, too."""

from __future__ import annotations

import sys
import tomllib
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from mq_quant.quantize.cli.start import main

ROOT = Path(__file__).parents[3]


class _Interrupts:
    """Ctrl-C comes when the app is looked for."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        if name == "mq_quant.quantize.cli.app":
            raise KeyboardInterrupt
        return None


def test_an_interruption_while_modules_are_loaded_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "mq_quant.quantize.cli.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Interrupts(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_the_command_begins_there() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"mq-quant": "mq_quant.quantize.cli.start:main"}
