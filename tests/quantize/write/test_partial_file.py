"""The partial file: what is refused before it is begun, bytes and journal lines, and the name that comes last."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import xxhash
from mq_quant.formats import file_lock
from mq_quant.formats.errors import InUseError, OutputError, ResumeError
from mq_quant.formats.hfq import QuantizationHash, TensorMeta
from mq_quant.quantize.write import partial_file
from mq_quant.quantize.write.partial_file import (
    CALIBRATION,
    JOURNAL,
    PARTIAL,
    Destination,
    PartialFile,
    beside,
)


@dataclass(frozen=True)
class Bytes:
    """A range that is a whole tensor too."""

    key: str
    start: int
    nbytes: int

    def meta(self) -> TensorMeta:
        return TensorMeta(self.key, 1, (self.nbytes,), 1, self.nbytes)


@dataclass(frozen=True)
class Small:
    """A file of two tensors of 4 bytes behind a header of 6."""

    data_offset: int = 6
    total_bytes: int = 14
    tensors: tuple[Bytes, ...] = field(default=(Bytes("a", 0, 4), Bytes("b", 4, 4)))


SMALL = Small()
A, B = SMALL.tensors


def opened(path: Path, signature: str = "mine", force: bool = False, restart: bool = False) -> PartialFile:
    return PartialFile(Destination(path, force), SMALL, SMALL.tensors, {"made of": signature}, restart)


def put(file: PartialFile, where: Bytes, data: bytes) -> None:
    file.put(where, memoryview(data), {"note": where.key})


def begun(path: Path) -> None:
    """Leave an unfinished file whose second tensor is written."""
    with opened(path) as file:
        put(file, B, b"BBBB")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_bytes_are_written_where_they_belong_and_the_name_comes_last(tmp_path: Path) -> None:
    final = tmp_path / "x"
    with opened(final) as file:
        assert beside(final, PARTIAL).stat().st_size == 14
        put(file, B, b"BBBB")
        put(file, A, b"AAAA")
        assert file.read(0, 8) == b"AAAABBBB"
        assert not final.exists()
        assert file.commit(b"header") == final
        assert final.read_bytes() == b"headerAAAABBBB"
    assert names(tmp_path) == ["x"]


def test_tensors_are_hashed_in_the_order_of_the_file_whatever_came_first(tmp_path: Path) -> None:
    expected = QuantizationHash()
    expected.update(A.meta(), [b"AAAA"])
    expected.update(B.meta(), [b"BBBB"])
    sums = [xxhash.xxh64_hexdigest(data) for data in (b"AAAA", b"BBBB")]
    for order in ((A, B), (B, A)):
        with opened(tmp_path / "x") as file:
            for each in order:
                put(file, each, each.key.upper().encode() * 4)
            assert (file.hash.quantization_hash, file.hash.checksums) == (expected.hexdigest, sums)
            file.commit(b"header")
        (tmp_path / "x").unlink()


def test_a_payload_of_another_size_is_a_fault_of_ours(tmp_path: Path) -> None:
    with opened(tmp_path / "x") as file, pytest.raises(AssertionError, match="3 bytes given, 4 planned"):
        put(file, A, b"AAA")


def test_what_an_earlier_run_wrote_is_taken_over_where_it_still_holds(tmp_path: Path) -> None:
    begun(tmp_path / "x")
    with opened(tmp_path / "x") as file:
        assert not file.begun_anew and file.done["b"]["note"] == "b"
        assert file.take_over([A, B], 2) == {"b"}
        put(file, A, b"AAAA")
        assert len(file.hash.checksums) == 2
    data = bytearray(beside(tmp_path / "x", PARTIAL).read_bytes())
    data[-1] ^= 1
    beside(tmp_path / "x", PARTIAL).write_bytes(data)
    with opened(tmp_path / "x") as file:
        assert file.take_over([A, B], 1) == {"a"}


def test_without_its_file_or_with_restart_the_journal_begins_anew(tmp_path: Path) -> None:
    begun(tmp_path / "x")
    beside(tmp_path / "x", PARTIAL).unlink()
    with opened(tmp_path / "x") as file:
        assert file.begun_anew and not file.done
    begun(tmp_path / "x")
    with opened(tmp_path / "x", "another", restart=True) as file:
        assert file.begun_anew and not file.done


def test_another_signature_is_refused_and_everything_stays(tmp_path: Path) -> None:
    begun(tmp_path / "x")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ResumeError, match="made of is 'mine' there and 'other' here"):
        opened(tmp_path / "x", "other")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_where_nothing_is_noted_nothing_stays(tmp_path: Path) -> None:
    with opened(tmp_path / "x"):
        assert len(names(tmp_path)) == 2
    assert names(tmp_path) == []
    (tmp_path / f"x{JOURNAL}").touch()
    (tmp_path / f"x{PARTIAL}").touch()
    with opened(tmp_path / "x", "whatever"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("restart", [False, True])
def test_a_second_process_touches_nothing(restart: bool, tmp_path: Path) -> None:
    with opened(tmp_path / "x") as first:
        put(first, A, b"AAAA")
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        with pytest.raises(InUseError, match="another build"):
            opened(tmp_path / "x", "another", restart=restart)
        with pytest.raises(InUseError, match="another build"):
            Destination(tmp_path / "x").check_unused()
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
        put(first, B, b"BBBB")
        first.commit(b"header")
    Destination(tmp_path / "x").check_unused()
    assert names(tmp_path) == ["x"]


def test_an_output_that_appears_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look and the lock another build may have finished."""
    real = Destination.check

    def check(self: Destination, total_bytes: int) -> None:
        real(self, total_bytes)
        (tmp_path / "x").write_bytes(b"finished")

    monkeypatch.setattr(Destination, "check", check)
    with pytest.raises(OutputError, match="exists already"):
        opened(tmp_path / "x")
    assert names(tmp_path) == ["x"]


def test_an_old_partial_file_of_another_size_is_cut_to_ours(tmp_path: Path) -> None:
    begun(tmp_path / "x")
    with beside(tmp_path / "x", PARTIAL).open("ab") as f:
        f.write(b"0" * 99)
    with opened(tmp_path / "x") as file:
        assert beside(tmp_path / "x", PARTIAL).stat().st_size == 14
        assert file.take_over([A, B], 1) == {"b"}


def test_a_file_cut_short_meanwhile_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path / "x") as file:
        beside(tmp_path / "x", PARTIAL).write_bytes(b"0")
        with pytest.raises(OutputError, match="has become shorter"):
            file.read(0, 8)


@pytest.mark.parametrize("suffix", [PARTIAL, JOURNAL])
@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "plain file"])
def test_what_took_the_place_of_a_helper_file_is_not_followed(suffix: str, kind: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_bytes(b"precious")
    begun(tmp_path / "x")
    helper = beside(tmp_path / "x", suffix)
    helper.unlink()
    if kind == "plain file":
        helper.mkdir()
    else:
        helper.symlink_to(mine) if kind == "symbolic link" else helper.hardlink_to(mine)
    with pytest.raises(OutputError, match=helper.name):
        opened(tmp_path / "x")
    assert mine.read_bytes() == b"precious" and not (tmp_path / "x").exists()


def test_only_the_file_that_was_written_gets_the_name(tmp_path: Path) -> None:
    partial = beside(tmp_path / "x", PARTIAL)
    for replace in (lambda: partial.write_bytes(b"other"), lambda: partial.symlink_to(tmp_path / "other")):
        with opened(tmp_path / "x", restart=True) as file:
            put(file, A, b"AAAA")
            partial.unlink()
            replace()
            with pytest.raises(OutputError, match="removed or replaced"):
                file.commit(b"header")
        assert not os.path.lexists(tmp_path / "x")
    with opened(tmp_path / "x", restart=True) as file:
        put(file, A, b"AAAA")
        shutil.move(partial, tmp_path / "elsewhere")
        with pytest.raises(OutputError, match="removed or replaced"):
            file.commit(b"header")


def test_a_share_with_changing_inode_numbers_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_file, "is_at", lambda fd, path: False)
    monkeypatch.setattr(file_lock, "is_at", lambda fd, path: False)
    with opened(tmp_path / "x") as file:
        pass
    assert names(tmp_path) == []
    with opened(tmp_path / "x") as file:
        put(file, A, b"AAAA")
        put(file, B, b"BBBB")
        file.commit(b"header")
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"headerAAAABBBB"


def test_a_name_that_cannot_be_given_keeps_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(self: Path, target: Path) -> Path:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with monkeypatch.context() as patch, opened(tmp_path / "x") as file:
        put(file, A, b"AAAA")
        put(file, B, b"BBBB")
        patch.setattr(Path, "rename", rename)
        with pytest.raises(
            OutputError, match=r"x: the finished file cannot be given this name(?s:.*)partial"
        ):
            file.commit(b"header")
    with opened(tmp_path / "x") as file:
        assert file.take_over([A, B], 1) == {"a", "b"}
        file.commit(b"header")
    assert (tmp_path / "x").read_bytes() == b"headerAAAABBBB"


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_reserving_space_is_a_service_that_may_be_missing(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fallocate(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    opened(tmp_path / "x").close()
    monkeypatch.delattr(os, "posix_fallocate")
    with opened(tmp_path / "x"):
        assert beside(tmp_path / "x", PARTIAL).stat().st_size == 14


def test_space_that_the_partial_file_holds_already_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside(tmp_path / "x", PARTIAL).write_bytes(b"0" * (1 << 20))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4096))
    Destination(tmp_path / "x").check(1 << 20)
    with pytest.raises(OutputError, match="needs"):
        Destination(tmp_path / "x", extra_bytes=1 << 20).check(1 << 20)


def test_a_name_too_long_for_its_helpers_is_refused_before_any_work(tmp_path: Path) -> None:
    most = os.pathconf(tmp_path, "PC_NAME_MAX")
    for size in (most, most + 1, most - len(CALIBRATION) + 1):
        with pytest.raises(OutputError, match=f"too long: it has {size} bytes"):
            opened(tmp_path / ("x" * size))
    with pytest.raises(OutputError, match="too long: it has 240 bytes"):
        opened(tmp_path / ("ü" * 120))
    assert names(tmp_path) == []
    with opened(tmp_path / ("x" * 200)) as file:
        file.commit(b"header")
    assert names(tmp_path) == ["x" * 200]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    """The finished bytes stay beside it, and --force gives them the name."""
    final = tmp_path / "x"
    with opened(final) as file:
        put(file, A, b"AAAA")
        put(file, B, b"BBBB")
        final.write_bytes(b"precious")
        with pytest.raises(OutputError, match="made by somebody else") as e:
            file.commit(b"header")
    assert "--force" in str(e.value)
    assert final.read_bytes() == b"precious"
    with opened(final, force=True) as file:
        assert set(file.done) == {"a", "b"}
        file.commit(b"header")
    assert final.read_bytes().endswith(b"AAAABBBB")


def test_a_device_or_a_pipe_is_not_replaced_even_by_force(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(OutputError, match="is no plain file"):
            Destination(path, force=True).check(0)
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_that_is_not_there_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="its folder does not exist"):
        opened(tmp_path / "none" / "x")
    with pytest.raises(OutputError, match="is a folder"):
        opened(tmp_path, force=True)


# --- bytes that others write ------------------------------------------------------------------------------------------


def test_what_another_process_has_written_is_noted(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as file:
        file.write(file.data_offset, b"aaaa")
        (tmp_path / "from").write_bytes(b"..bbbb")
        with (tmp_path / "from").open("rb") as other:
            file.copy(B, other.fileno(), 2)
        assert file.note(A, xxhash.xxh64_hexdigest(b"aaaa"), {"note": "a"})
        assert file.note(B, xxhash.xxh64_hexdigest(b"bbbb"), {})
        assert file.done["a"]["note"] == "a"
        file.commit(b"header")
    assert (tmp_path / "out").read_bytes() == b"headeraaaabbbb"


def test_what_is_not_there_as_it_was_told_is_not_noted(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as file:
        file.write(file.data_offset, b"aaab")
        assert not file.note(A, xxhash.xxh64_hexdigest(b"aaaa"), {})
        (tmp_path / "short").write_bytes(b"bb")
        with (tmp_path / "short").open("rb") as other:
            file.copy(B, other.fileno(), 0)
        assert not file.note(B, xxhash.xxh64_hexdigest(b"bbbb"), {})
        assert not file.done
    assert [path.name for path in tmp_path.iterdir()] == ["short"]
