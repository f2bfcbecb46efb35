"""Hashes that huggingface_hub left beside a file: a byte that changed on the disk is found."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import small_model
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.checkpoint.stated_hash import check_stated_hash, stated_hash
from mq_quant.formats.errors import CheckpointError
from mq_quant.formats.unchanged import UnchangedFile

DATA = b"the bytes of a shard"


def hashes(data: bytes) -> dict[str, str]:
    """The names that a cache gives to a large and to a small file of these bytes."""
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return {"large": hashlib.sha256(data).hexdigest(), "small": git}


def cached(folder: Path, name: str, data: bytes, kind: str) -> Path:
    """A file in a cache: a link in a snapshot to a blob that is named by its hash."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / ("0" * 40)
    for each in (blobs, snapshot):
        each.mkdir(parents=True, exist_ok=True)
    blob = hashes(data)[kind]
    (blobs / blob).write_bytes(data)
    (snapshot / name).symlink_to(Path("../../blobs") / blob)
    return snapshot / name


def downloaded(folder: Path, name: str, data: bytes, kind: str) -> Path:
    """A file in a folder of one's own, with the record of its download."""
    records = folder / ".cache" / "huggingface" / "download"
    records.mkdir(parents=True)
    (folder / name).write_bytes(data)
    now = (folder / name).stat().st_mtime
    (records / f"{name}.metadata").write_text(f"{'0' * 40}\n{hashes(data)[kind]}\n{now}\n")
    return folder / name


def check(path: Path) -> None:
    check_stated_hash(UnchangedFile(path, CheckpointError))


@pytest.mark.parametrize("kind", ["large", "small"])
@pytest.mark.parametrize("make", [cached, downloaded])
def test_a_changed_byte_is_found(make: object, kind: str, tmp_path: Path) -> None:
    assert callable(make)
    path = make(tmp_path, "model.safetensors", DATA, kind)
    assert stated_hash(path) == hashes(DATA)[kind]
    check(path)
    time = path.stat().st_mtime_ns
    path.write_bytes(DATA[:-1] + b"D")
    os.utime(path, ns=(time, time))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its bytes have the hash"):
        check(path)


def test_a_file_that_was_edited_after_its_download_is_the_users_own(tmp_path: Path) -> None:
    path = downloaded(tmp_path, "config.json", DATA, "small")
    path.write_bytes(b"edited")
    time = path.stat().st_mtime_ns + 10**10
    os.utime(path, ns=(time, time))
    check(path)


@pytest.mark.parametrize("text", ["", "x", "a\nb\nc\n", f"a\n{'0' * 64}\nnever\n", f"a\n{'0' * 63}\n9e99\n"])
def test_a_record_that_cannot_be_read_states_nothing(text: str, tmp_path: Path) -> None:
    path = downloaded(tmp_path, "config.json", DATA, "small")
    (tmp_path / ".cache/huggingface/download/config.json.metadata").write_text(text)
    assert stated_hash(path) is None


@pytest.mark.parametrize("number", ["0" * 63 + "7", "0" * 39 + "7", "0" * 16 + "f" * 48])
def test_numbers_that_a_tool_has_counted_up_state_nothing(number: str, tmp_path: Path) -> None:
    """Some tools lay out such a cache without hashing: no hash begins with sixteen zeros."""
    path = cached(tmp_path, "config.json", DATA, "large")
    path.unlink()
    path.symlink_to(Path("../../blobs") / number)
    assert stated_hash(path) is None


def test_files_elsewhere_and_links_to_them_state_nothing(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    file = tmp_path / "blobs" / ("0" * 64)
    file.write_bytes(DATA)
    (tmp_path / "link").symlink_to(file.rename(tmp_path / "elsewhere"))
    assert stated_hash(tmp_path / "elsewhere") is None
    assert stated_hash(tmp_path / "link") is None


def test_a_checkpoint_in_the_cache_is_held_against_its_blobs(tmp_path: Path) -> None:
    plain = small_model.save(tmp_path / "plain", small_model.tensors())
    for file in plain.iterdir():
        path = cached(
            tmp_path / "cache",
            file.name,
            file.read_bytes(),
            "large" if file.suffix == ".safetensors" else "small",
        )
    assert open_checkpoint(path.parent).fingerprint() == open_checkpoint(plain).fingerprint()
    shard = path.parent / "model-00002-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=shard.name):
        open_checkpoint(path.parent).fingerprint()
