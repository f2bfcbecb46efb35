"""The fuzz campaign: it finds what is wrong, keeps the input, and says how to read it again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import fuzz_readers
import pytest
from fuzz_targets import TARGETS, input_of
from mq_quant.formats.errors import HfqError, HfqKind


def refuse(folder: Path) -> None:
    raise HfqError("is refused", kind=HfqKind.NOT_HFQ)


def attack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, reader: object
) -> list[dict[str, object]]:
    """The lines of an attack on token files with this reader, whose first file is always taken."""
    good = TARGETS["tokens"].make(tmp_path)

    def read(folder: Path) -> None:
        if (folder / "tokens.npy").read_bytes() != good:
            assert callable(reader)
            reader(folder)

    monkeypatch.setitem(TARGETS, "tokens", replace(TARGETS["tokens"], read=read))
    monkeypatch.setattr(fuzz_readers, "limit_memory", lambda: None)
    fuzz_readers.attack("tokens", 5, 3, tmp_path / "at")
    assert (tmp_path / "at").read_text() == "7"
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_errors_of_ours_are_no_findings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert attack(monkeypatch, capsys, tmp_path, refuse) == [{"taken": 0, "refused": 3}]


@pytest.mark.parametrize("fault", [ValueError("boom"), MemoryError(), SystemExit(3), RecursionError("deep")])
def test_every_other_exception_is_one(
    fault: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(folder: Path) -> None:
        raise fault

    *found, sums = attack(monkeypatch, capsys, tmp_path, fail)
    assert [line["input"] for line in found] == [5, 6, 7]
    assert all(type(fault).__name__ in str(line["fault"]) for line in found)
    assert sums == {"taken": 0, "refused": 0}


def test_an_end_by_a_signal_is_found_and_the_rest_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def child(name: str, first: int, count: int) -> tuple[list[dict[str, object]], int]:
        return ([], 6) if first == 5 else ([{"taken": 0, "refused": count}], first + count - 1)

    monkeypatch.setattr(fuzz_readers, "_child", child)
    assert fuzz_readers.campaign(["tokens"], 5, 4, tmp_path / "keep") == 1
    said = capsys.readouterr().out
    assert "FINDING tokens 6: ended the process" in said
    assert "0 taken, 2 refused" in said
    seed = TARGETS["tokens"].make(tmp_path)
    assert (tmp_path / "keep" / "tokens-6").read_bytes() == input_of("tokens", 6, seed)


def test_a_whole_campaign_in_processes_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_readers.main(["--inputs", "5", "--only", "tokens", "--keep", str(tmp_path / "keep")]) == 0
    assert "5 inputs, 0 findings" in capsys.readouterr().out
    assert not (tmp_path / "keep").exists()


def test_inputs_are_the_same_whenever_they_are_made(tmp_path: Path) -> None:
    for name, target in TARGETS.items():
        (tmp_path / name).mkdir()
        seed = target.make(tmp_path / name)
        assert input_of(name, 3, seed) == input_of(name, 3, seed)
        assert len({input_of(name, number, seed) for number in range(20)}) > 10
