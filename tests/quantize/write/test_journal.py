"""The journal: whole lines are kept, torn and altered ones are not, and the job it belongs to is held against ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.errors import OutputError, ResumeError
from mq_quant.quantize.write.journal import Journal, differences, read_journal


def write(path: Path, count: int, job: dict[str, object] | None = None) -> None:
    journal = Journal(path, job or {"fit": "exact"})
    for i in range(count):
        journal.record(f"unit {i}", f"{i:016x}", report={"alpha": i / 4})
    journal.close()


def test_what_was_recorded_is_there_again(tmp_path: Path) -> None:
    write(tmp_path / "j", 3)
    journal = Journal(tmp_path / "j", {"fit": "exact"})
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
        journal = Journal(path, {"fit": "exact"})
        journal.record("next", "0" * 16)
        journal.close()
        assert [r.get("unit") for r in read_journal(path)[0]][1:] == [
            *(r["unit"] for r in found[1:]),
            "next",
        ]


def test_a_flipped_bit_ends_what_is_trusted(tmp_path: Path) -> None:
    write(tmp_path / "j", 4)
    lines = (tmp_path / "j").read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"unit 1", b"unit 9")
    (tmp_path / "j").write_bytes(b"".join(lines))
    records, _ = read_journal(tmp_path / "j")
    assert [r.get("unit") for r in records] == [None, "unit 0"]


def test_another_job_is_refused_and_the_file_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "j", 2, {"fit": "exact", "gain": True})
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(ResumeError, match="fit is 'exact' there and 'hessian' here"):
        Journal(tmp_path / "j", {"fit": "hessian", "gain": True})
    assert (tmp_path / "j").read_bytes() == before


def test_a_journal_in_use_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", {})
    with pytest.raises(OutputError, match="another build"):
        Journal(tmp_path / "j", {})
    journal.close()
    Journal(tmp_path / "j", {}).close()


def test_differences_name_keys_that_only_one_side_has() -> None:
    assert differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == [
        "a is 1 there and None here",
        "b is 2 there and 3 here",
        "c is None there and 4 here",
    ]
    assert differences({"a": [1, 2]}, {"a": [1, 2]}) == []
