"""The journal: whole lines are kept, torn and altered ones are not, and its signature is held against ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.errors import InUseError, OutputError, ResumeError
from mq_quant.quantize.write.journal import (
    BUILD,
    CALIBRATION,
    SHOWN,
    VALUE,
    Journal,
    _line,
    differences,
    read_journal,
)


def opened(path: Path, signature: dict[str, object], work: str = BUILD) -> Journal:
    journal = Journal(path, work)
    try:
        journal.begin(signature)
    except BaseException:
        journal.close()
        raise
    return journal


def write(path: Path, count: int, signature: dict[str, object] | None = None) -> None:
    journal = opened(path, signature or {"fit": "exact"})
    for i in range(count):
        journal.record(f"unit {i}", f"{i:016x}", report={"alpha": i / 4})
    journal.close()


def test_what_was_recorded_is_there_again(tmp_path: Path) -> None:
    write(tmp_path / "j", 3)
    journal = opened(tmp_path / "j", {"fit": "exact"})
    assert list(journal.done) == ["unit 0", "unit 1", "unit 2"]
    assert journal.done["unit 2"] == {"unit": "unit 2", "xxh64": f"{2:016x}", "report": {"alpha": 0.5}}
    journal.close()


@given(st.integers(0, 400), st.binary(max_size=60))
def test_after_any_cut_and_any_garbage_a_prefix_is_left(cut: int, garbage: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "j"
        write(path, 4)
        whole, _ = read_journal(path)
        data = path.read_bytes()
        path.write_bytes(data[: max(0, len(data) - cut)] + garbage)
        found, size = read_journal(path)
        assert found == whole[: len(found)]
        assert path.read_bytes()[:size] == data[:size]
        journal = opened(path, {"fit": "exact"})
        journal.record("next", "0" * 16)
        journal.close()
        assert [r.get("unit") for r in read_journal(path)[0]][1:] == [
            *(r["unit"] for r in found[1:]),
            "next",
        ]


def test_a_write_that_takes_fewer_bytes_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:7]))
    write(tmp_path / "j", 3)
    assert len(read_journal(tmp_path / "j")[0]) == 4


def test_a_journal_without_a_unit_belongs_to_whoever_comes(tmp_path: Path) -> None:
    write(tmp_path / "j", 0, {"fit": "exact"})
    journal = opened(tmp_path / "j", {"fit": "hessian"})
    journal.close()
    assert read_journal(tmp_path / "j")[0] == [{"job": {"fit": "hessian"}}]


def test_a_journal_that_was_never_begun_is_not_left_behind(tmp_path: Path) -> None:
    Journal(tmp_path / "j").close()
    assert not (tmp_path / "j").exists()


def test_a_flipped_bit_ends_what_is_trusted(tmp_path: Path) -> None:
    write(tmp_path / "j", 4)
    lines = (tmp_path / "j").read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"unit 1", b"unit 9")
    (tmp_path / "j").write_bytes(b"".join(lines))
    records, _ = read_journal(tmp_path / "j")
    assert [r.get("unit") for r in records] == [None, "unit 0"]


@pytest.mark.parametrize(
    "record", [{}, {"unit": 5, "xxh64": "0"}, {"unit": "a"}, {"job": {}}, {"unit": "a", "xxh64": None}]
)
def test_a_line_of_another_kind_ends_what_is_trusted(record: dict[str, object], tmp_path: Path) -> None:
    write(tmp_path / "j", 2)
    with (tmp_path / "j").open("ab") as f:
        f.write(_line(record))
    assert len(read_journal(tmp_path / "j")[0]) == 3
    (tmp_path / "j").write_bytes(_line({"unit": "a", "xxh64": "0"}) + _line({"job": []}))
    assert read_journal(tmp_path / "j") == ([], 0)


def test_another_signature_is_refused_and_the_file_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "j", 2, {"fit": "exact", "gain": True})
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(ResumeError, match="fit is 'exact' there and 'hessian' here"):
        opened(tmp_path / "j", {"fit": "hessian", "gain": True})
    assert (tmp_path / "j").read_bytes() == before


def test_a_journal_in_use_is_refused(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j", {})
    with pytest.raises(OutputError, match="another build"):
        opened(tmp_path / "j", {})
    journal.close()
    opened(tmp_path / "j", {}).close()


def test_differences_name_keys_that_only_one_side_has() -> None:
    assert differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == [
        "a is 1 there and None here",
        "b is 2 there and 3 here",
        "c is None there and 4 here",
    ]
    assert differences({"a": [1, 2]}, {"a": [1, 2]}) == []


def test_what_a_person_gave_is_named_first_in_few_short_lines(tmp_path: Path) -> None:
    there = {"recipe.tier": "mq4", "recipe.rules": [{"tensors": "a" * 200}], "plan": "0" * 64} | {
        f"source.files.{n}.sha256": f"{n:064x}" for n in range(20)
    }
    here = dict.fromkeys(there, "x")
    assert differences(there, here)[0] == "recipe.tier is 'mq4' there and 'x' here"
    assert differences(there, here)[-2].startswith("recipe.rules is [{'tensors': 'aaa")
    write(tmp_path / "j", 2, there)
    with pytest.raises(ResumeError) as caught:
        opened(tmp_path / "j", here)
    lines = str(caught.value).splitlines()
    assert len(lines) == SHOWN + 3 and lines[-2].strip() == f"and {len(there) - SHOWN} more"
    assert max(map(len, lines[1:])) < 2 * VALUE + 80


def test_values_that_differ_far_behind_are_not_shown_as_equal() -> None:
    assert differences({"a": "x" * 500 + "1"}, {"a": "x" * 500 + "2"}) == ["a differs"]


def test_a_calibration_speaks_of_itself(tmp_path: Path) -> None:
    write(tmp_path / "j", 1)
    with pytest.raises(ResumeError, match="the unfinished calibration was begun"):
        opened(tmp_path / "j", {"fit": "other"}, CALIBRATION)
    held = Journal(tmp_path / "j", CALIBRATION)
    with pytest.raises(InUseError, match="another calibration"):
        Journal(tmp_path / "j", CALIBRATION)
    held.close()
