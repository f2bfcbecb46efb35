"""Files that change while they are in use: the change is found, and what did not change is not refused."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
from mq_quant.formats import unchanged
from mq_quant.formats.errors import CheckpointError, ImatrixError
from mq_quant.formats.unchanged import ATTEMPTS, UnchangedFile

OLD = b"weights of the beginning"
NEW = b"other weights, same size"
assert len(OLD) == len(NEW)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(OLD)
    os.utime(path, ns=(10**18, 10**18))
    return path


def whole(file: BinaryIO) -> bytes:
    return file.read()


def test_a_file_that_stays_is_read_any_number_of_times(path: Path) -> None:
    file = UnchangedFile(path, CheckpointError)
    assert [file.read(whole) for _ in range(3)] == [OLD] * 3
    assert file.sha256() == hashlib.sha256(OLD).hexdigest()
    assert file.content(100) == OLD
    assert file.size == len(OLD)
    file.check()


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("data", [NEW, OLD[:-1], OLD + b"!", b""])
def test_other_bytes_in_place_are_refused(path: Path, data: bytes, hashed: bool) -> None:
    file = UnchangedFile(path, CheckpointError)
    if hashed:
        file.sha256()
    with path.open("r+b") as f:
        f.write(data)
        f.truncate(len(data))
    with pytest.raises(CheckpointError, match=r"shard\.safetensors: changed"):
        file.read(whole)
    with pytest.raises(CheckpointError, match="changed"):
        file.check()


def test_a_writer_that_sets_the_time_back_is_found_by_the_hash(path: Path) -> None:
    file = UnchangedFile(path, CheckpointError)
    file.sha256()
    path.write_bytes(NEW)
    os.utime(path, ns=(10**18, 10**18))
    with pytest.raises(CheckpointError, match="changed"):
        file.read(whole)


def test_a_file_that_was_replaced_is_refused(path: Path, tmp_path: Path) -> None:
    file = UnchangedFile(path, ImatrixError)
    other = tmp_path / "other"
    other.write_bytes(NEW)
    os.utime(other, ns=(10**18, 10**18))
    other.replace(path)
    with pytest.raises(ImatrixError, match="changed"):
        file.read(whole)


def test_a_file_that_went_away_is_named(path: Path) -> None:
    file = UnchangedFile(path, CheckpointError)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"shard\.safetensors: cannot be read"):
        file.read(whole)
    with pytest.raises(CheckpointError, match="cannot be read"):
        UnchangedFile(path, CheckpointError)


def test_what_is_no_plain_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(CheckpointError, match="not a plain file"):
            UnchangedFile(path, CheckpointError)


@pytest.mark.parametrize("hashed", [False, True])
def test_another_mode_or_name_is_no_change(path: Path, tmp_path: Path, hashed: bool) -> None:
    file = UnchangedFile(path, CheckpointError)
    if hashed:
        file.sha256()
    path.chmod(0o400)
    (tmp_path / "link").hardlink_to(path)
    assert file.read(whole) == OLD


def test_the_same_bytes_written_again_are_no_change_once_the_hash_is_known(
    path: Path, tmp_path: Path
) -> None:
    file = UnchangedFile(path, CheckpointError)
    file.sha256()
    other = tmp_path / "other"
    other.write_bytes(OLD)
    other.replace(path)
    assert file.read(whole) == OLD
    path.write_bytes(NEW)
    with pytest.raises(CheckpointError, match="changed"):
        file.read(whole)


def test_what_was_read_during_a_change_is_not_used(path: Path) -> None:
    file = UnchangedFile(path, CheckpointError)
    file.sha256()
    seen = []

    def use(f: BinaryIO) -> bytes:
        """The first time, the file holds other bytes while it is read, and the old ones before and after."""
        if not seen:
            path.write_bytes(NEW)
            os.utime(path, ns=(2 * 10**18, 2 * 10**18))
        data = f.read()
        if not seen:
            path.write_bytes(OLD)
            os.utime(path, ns=(3 * 10**18, 3 * 10**18))
        seen.append(data)
        return data

    assert file.read(use) == OLD
    assert seen == [NEW, OLD]


def test_a_file_that_never_rests_is_refused(path: Path) -> None:
    file = UnchangedFile(path, CheckpointError)
    file.sha256()
    count = 0

    def use(f: BinaryIO) -> None:
        nonlocal count
        count += 1
        os.utime(path, ns=(count, count))

    with pytest.raises(CheckpointError, match="changed"):
        file.read(use)
    assert count == ATTEMPTS


def test_an_error_of_the_reader_is_explained_by_the_change(path: Path) -> None:
    file = UnchangedFile(path, CheckpointError)

    def short(f: BinaryIO) -> None:
        path.write_bytes(b"")
        raise CheckpointError("ends inside this tensor", file=path)

    with pytest.raises(CheckpointError, match="changed"):
        file.read(short)


def test_an_error_of_the_reader_stays_where_nothing_changed(path: Path) -> None:
    def broken(f: BinaryIO) -> None:
        raise CheckpointError("is broken", file=path)

    with pytest.raises(CheckpointError, match="is broken"):
        UnchangedFile(path, CheckpointError).read(broken)


def test_content_is_bounded_and_is_what_was_hashed(path: Path) -> None:
    file = UnchangedFile(path, ImatrixError)
    with pytest.raises(ImatrixError, match=f"{len(OLD)} bytes, more than 10"):
        file.content(10)
    assert file.content(len(OLD)) == OLD
    path.write_bytes(NEW)
    with pytest.raises(ImatrixError, match="changed"):
        file.check()
    with pytest.raises(ImatrixError, match="changed"):
        file.content(len(OLD))


# --- hashes of somebody else ------------------------------------------------------------------------------------------


def counting(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The files that are hashed from now on."""
    hashed: list[object] = []
    sha256 = unchanged._sha256

    def count(file: BinaryIO, **more: object) -> str:
        hashed.append(file.name)
        return sha256(file, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(unchanged, "_sha256", count)
    return hashed


def test_the_same_file_is_not_hashed_again_on_any_machine(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = UnchangedFile(path, CheckpointError).known()
    hashed = counting(monkeypatch)
    elsewhere = replace(known, state=replace(known.state, device=known.state.device + 1))
    for each in (known, elsewhere):
        file = UnchangedFile(path, CheckpointError)
        file.believe(each)
        assert file.read(whole) == OLD
        assert file.record() == known.as_record() == {"bytes": len(OLD), "sha256": known.sha256}
    assert not hashed


def test_the_hash_of_another_machine_is_taken_for_the_same_file_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = UnchangedFile(path, CheckpointError).known()
    copy = path.with_name("copy")
    copy.write_bytes(OLD)
    hashed = counting(monkeypatch)
    file = UnchangedFile(path, CheckpointError)
    assert file.trust(replace(known, state=replace(known.state, device=known.state.device + 1)))
    assert file.sha256() == known.sha256 and not hashed
    other = UnchangedFile(copy, CheckpointError)
    assert not other.trust(known)
    assert other.sha256() == known.sha256 and len(hashed) == 1


def test_a_copy_is_hashed_once_before_its_first_use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = UnchangedFile(path, CheckpointError).known()
    copy = path.with_name("copy")
    copy.write_bytes(OLD)
    hashed = counting(monkeypatch)
    file = UnchangedFile(copy, CheckpointError)
    file.believe(known)
    assert [file.read(whole) for _ in range(3)] == [OLD] * 3
    assert len(hashed) == 1


@pytest.mark.parametrize("content", [NEW, OLD[:-1], OLD + b"x", b""])
def test_a_file_that_is_no_copy_is_refused(path: Path, content: bytes) -> None:
    known = UnchangedFile(path, CheckpointError).known()
    other = path.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(10**18, 10**18))
    file = UnchangedFile(other, CheckpointError)
    file.believe(known)
    with pytest.raises(CheckpointError, match="other: has other bytes than the file of this name"):
        file.read(whole)
