"""The partial output, and what is refused before it is begun; console text; provenance helpers; progress."""

from __future__ import annotations

from pathlib import Path

import pytest
from mq_quant.formats.errors import OutputError
from mq_quant.quantize.cli.console import gigabytes, table
from mq_quant.quantize.cli.progress_bar import Progress
from mq_quant.quantize.spec.provenance import flatten, program
from mq_quant.quantize.write.partial_file import PARTIAL, PartialOutput, beside, check_output


def test_bytes_are_written_where_they_belong_and_the_name_comes_last(tmp_path: Path) -> None:
    final = tmp_path / "x"
    output = PartialOutput(final, 10)
    assert beside(final, PARTIAL).stat().st_size == 10
    output.write(6, memoryview(b"late"))
    output.write(0, memoryview(b"early"))
    assert output.read(0, 10) == b"early\0late"
    assert not final.exists()
    output.commit()
    output.close()
    assert final.read_bytes() == b"early\0late"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_an_old_partial_file_of_another_size_is_cut_to_ours(tmp_path: Path) -> None:
    beside(tmp_path / "x", PARTIAL).write_bytes(b"0" * 99)
    PartialOutput(tmp_path / "x", 10).close()
    assert beside(tmp_path / "x", PARTIAL).stat().st_size == 10


def test_a_file_cut_short_meanwhile_is_an_error(tmp_path: Path) -> None:
    output = PartialOutput(tmp_path / "x", 10)
    beside(tmp_path / "x", PARTIAL).write_bytes(b"0")
    with pytest.raises(OutputError, match="has become shorter"):
        output.read(0, 10)
    output.close()


def test_space_that_the_partial_file_holds_already_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    output = PartialOutput(tmp_path / "x", 1 << 20)
    output.close()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4096))
    check_output(tmp_path / "x", 1 << 20, force=False)
    with pytest.raises(OutputError, match="needs"):
        check_output(tmp_path / "x", 1 << 20, force=False, extra_bytes=1 << 20)


def test_a_folder_that_cannot_be_written_to_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        PartialOutput(tmp_path / "none" / "x", 10)


@pytest.mark.parametrize(
    ("count", "text"), [(86_180_388_864, "86.2 GB"), (2_037_760, "2.0 MB"), (1500, "1.5 kB"), (7, "7 B")]
)
def test_sizes_read_well(count: int, text: str) -> None:
    assert gigabytes(count) == text


def test_tables_align_numbers_to_the_right() -> None:
    assert table(("name", "n"), [("a", 5), ("long", 123)]) == "name    n\na       5\nlong  123"


def test_flatten_names_every_leaf() -> None:
    assert dict(flatten({"a": {"b": 1, "c": [2]}, "d": None})) == {"a.b": 1, "a.c": [2], "d": None}


def test_the_program_says_its_version_and_commit() -> None:
    said = program()
    assert said["name"] == "mq-quant"
    assert said["commit"] is None or len(said["commit"]) == 40


def test_progress_is_silent_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (True, False):
        with Progress("x", 10, 0, quiet) as bar:
            bar.advance(5, "unit")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""
