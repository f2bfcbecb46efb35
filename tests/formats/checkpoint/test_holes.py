"""Shards that a download tool reserved and did not fill: found on metadata alone, where the file system tells."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import small_model
import torch
from mq_quant.formats.checkpoint.holes import hollow
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.checkpoint.safetensors_file import header_of
from mq_quant.formats.errors import WeightError
from safetensors.torch import save_file

WHOLE = small_model.tensors()
SHARD = "model-00002-of-00002.safetensors"


def reserve(path: Path, keep: int) -> None:
    """Leave the header and `keep` bytes of payloads; all after that is a hole of the same length."""
    data = path.read_bytes()
    with path.open("wb") as f:
        f.write(data[: 8 + int.from_bytes(data[:8], "little") + keep])
        f.truncate(len(data))


def knows_holes(folder: Path) -> bool:
    with (folder / "probe").open("wb+") as f:
        f.truncate(1 << 20)
        try:
            return os.lseek(f.fileno(), 0, os.SEEK_HOLE) == 0
        except (OSError, AttributeError):
            return False


@pytest.mark.parametrize("keep", [0, 300_000])
def test_a_shard_that_was_never_filled_is_refused_before_a_weight_is_read(keep: int, tmp_path: Path) -> None:
    if not knows_holes(tmp_path):
        pytest.skip("this file system knows no holes")
    folder = small_model.save(tmp_path / "m", WHOLE)
    reserve(folder / SHARD, keep)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(WeightError, match=r"zero.*hole") as e:
        checkpoint.validate()
    assert checkpoint.tensors[e.value.tensor or ""].shard == SHARD
    assert e.value.file == str(folder / SHARD)


def test_zero_biases_and_tensors_that_are_left_out_may_lie_in_holes(tmp_path: Path) -> None:
    bias = "model.layers.0.block_sparse_moe.e_score_correction_bias"
    path = tmp_path / "model.safetensors"
    save_file({bias: torch.zeros(1 << 16), "x": torch.zeros(1 << 16)}, path)
    reserve(path, 0)
    with path.open("rb") as f:
        tensors = header_of(f, path)
        assert hollow(f, [t for t in tensors if t.name == bias]) is None
        found = hollow(f, tensors)
        assert (found is not None and found.name == "x") or not knows_holes(tmp_path)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENXIO])
def test_file_systems_without_holes_report_none(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_model.save(tmp_path, WHOLE)
    checkpoint = open_checkpoint(folder)

    def refuse(*_: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("mq_quant.formats.checkpoint.holes.os.lseek", refuse)
    checkpoint.validate()
