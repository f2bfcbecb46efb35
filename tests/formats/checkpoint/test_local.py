"""Checkpoints in a folder: every way one can be broken or change while it is read, then what is read of a good one."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_model
import torch
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.checkpoint.source import Source
from mq_quant.formats.errors import CheckpointError, ConfigError
from safetensors import safe_open
from safetensors.torch import save_file
from small_model import CONFIG, Tensors

WHOLE = small_model.tensors()
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def altered(**changes: torch.Tensor | None) -> Tensors:
    """The whole checkpoint with some tensors replaced, added, or (None) left out."""
    return {n: t for n, t in (WHOLE | changes).items() if t is not None}


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, data: bytes | str) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data) and None
    )


def remap(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return apply


SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12\n"


def cut(keep: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / SHARD, keep)


def shard(header: Any, payload: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + payload


def f32(start: int, stop: int, *shape: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


BROKEN: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "no config": (drop("config.json"), ConfigError, "config.json: cannot be read"),
    "config is no JSON": (write("config.json", "{"), ConfigError, "config.json"),
    "config nests deep": (
        write("config.json", '{"a":' + "[" * 10**5 + "]" * 10**5 + "}"),
        ConfigError,
        "deeper",
    ),
    "other model": (write("config.json", '{"model_type": "llama"}'), ConfigError, "llama"),
    "no index": (drop(INDEX), CheckpointError, "index.json: cannot be read"),
    "weights of another form": (
        lambda folder: (folder / INDEX).rename(folder / "pytorch_model.bin") and None,
        CheckpointError,
        "holds its weights in another form: pytorch_model.bin",
    ),
    "index without map": (write(INDEX, "{}"), CheckpointError, "weight_map"),
    "index is no JSON": (write(INDEX, b"\xff\xfe{}"), CheckpointError, "index.json"),
    "missing shard": (drop(SHARD), CheckpointError, f"1 of 2 shards are missing: {SHARD}"),
    "index names a tensor the shard lacks": (
        remap(lambda m: m.update(ghost=SHARD)),
        CheckpointError,
        f"ghost: is not in {SHARD}",
    ),
    "index names another shard": (remap(lambda m: m.update({NORM: SHARD})), CheckpointError, "is not in"),
    "index lacks a tensor": (remap(lambda m: m.pop(NORM)), CheckpointError, f"lacks tensors.*{NORM}"),
    "path traversal": (
        remap(lambda m: m.update(a="../a.safetensors")),
        CheckpointError,
        "plain .safetensors",
    ),
    "absolute path": (
        remap(lambda m: m.update(a="/etc/a.safetensors")),
        CheckpointError,
        "plain .safetensors",
    ),
    "drive letter": (remap(lambda m: m.update(a="c:a.safetensors")), CheckpointError, "plain .safetensors"),
    "backslash": (remap(lambda m: m.update(a="..\\a.safetensors")), CheckpointError, "plain .safetensors"),
    "NUL": (remap(lambda m: m.update(a="a\0.safetensors")), CheckpointError, "plain .safetensors"),
    "endless name": (
        remap(lambda m: m.update(a="a" * 300 + ".safetensors")),
        CheckpointError,
        "plain .safetensors",
    ),
    "other suffix": (remap(lambda m: m.update(a="model.bin")), CheckpointError, "plain .safetensors"),
    "shard is a number": (remap(lambda m: m.update(a=3)), CheckpointError, "plain .safetensors"),
    "empty shard": (cut(0), CheckpointError, f"{SHARD}: is not a safetensors file.*has 0 bytes"),
    "shard is a pointer": (write(SHARD, POINTER), CheckpointError, f"{SHARD}: is a pointer file of Git LFS"),
    "index is a pointer": (write(INDEX, POINTER), CheckpointError, f"{INDEX}: is a pointer file of Git LFS"),
    "config is a pointer": (
        write("config.json", POINTER),
        ConfigError,
        "config.json: is a pointer file of Git LFS",
    ),
    "shard cut in its length": (cut(7), CheckpointError, "not a safetensors file"),
    "shard cut in its header": (cut(60), CheckpointError, "ends inside its header"),
    "shard cut in its payloads": (cut(200_000), CheckpointError, "has 200000 bytes, its header needs"),
    "header of 2^63": (write(SHARD, shard(b"{}", length=1 << 63)), CheckpointError, "header length"),
    "header is no JSON": (write(SHARD, shard(b"{a}")), CheckpointError, "not JSON"),
    "header nests deep": (
        write(SHARD, shard(b'{"a":' * 9999 + b"1" + b"}" * 9999)),
        CheckpointError,
        "deeper",
    ),
    "name repeats": (
        write(SHARD, shard(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}')),
        CheckpointError,
        "repeats the key",
    ),
    "hole": (write(SHARD, shard({"a": f32(4, 8, 1)}, bytes(8))), CheckpointError, "begins at"),
    "overlap": (
        write(SHARD, shard({"a": f32(0, 4, 1), "b": f32(0, 4, 1)}, bytes(4))),
        CheckpointError,
        "begins at",
    ),
    "trailing bytes": (write(SHARD, shard({"a": f32(0, 4, 1)}, bytes(9))), CheckpointError, "header needs"),
    "size against shape": (
        write(SHARD, shard({"a": f32(0, 4, 2)}, bytes(4))),
        CheckpointError,
        "takes 4 bytes",
    ),
    "offsets backwards": (write(SHARD, shard({"a": f32(4, 0, 1)}, bytes(4))), CheckpointError, "takes -4"),
    "shape that overflows": (
        write(SHARD, shard({"a": f32(0, 0, 2**61, 2**61, 0)}, b"")),
        CheckpointError,
        "is not in|lacks",
    ),
    "shape of 2^63": (
        write(SHARD, shard({"a": f32(0, 4, 2**63)}, bytes(4))),
        CheckpointError,
        "whole numbers",
    ),
    "negative shape": (
        write(SHARD, shard({"a": f32(0, 4, -1, -1)}, bytes(4))),
        CheckpointError,
        "whole numbers",
    ),
    "shape of truth": (
        write(SHARD, shard({"a": f32(0, 4, True)}, bytes(4))),
        CheckpointError,
        "whole numbers",
    ),
    "unknown dtype": (
        write(SHARD, shard({"a": f32(0, 4, 1, dtype="X9")}, bytes(4))),
        CheckpointError,
        "'X9'",
    ),
    "entry is a list": (write(SHARD, shard({"a": []})), CheckpointError, "lacks dtype"),
    "unprintable name": (
        write(SHARD, shard({"\x1b[2J": f32(0, 4, 1)}, bytes(4))),
        CheckpointError,
        "printed",
    ),
    "tensor in two shards": (
        lambda folder: (folder / SHARD).write_bytes((folder / OTHER).read_bytes()) and None,
        CheckpointError,
        "lies in two shards",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(case: str, tmp_path: Path) -> None:
    break_it, error, text = BROKEN[case]
    folder = small_model.save(tmp_path / "m", WHOLE)
    open_checkpoint(folder).validate()
    break_it(folder)
    with pytest.raises(error, match=text):
        open_checkpoint(folder)


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        open_checkpoint(tmp_path / "none")


def test_shard_truncated_anywhere(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    open_checkpoint(tmp_path)
    for length in reversed(range((tmp_path / "model.safetensors").stat().st_size)):
        os.truncate(tmp_path / "model.safetensors", length)
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 5000, None])
def test_a_shard_that_changes_after_opening_is_named(size: int | None, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, WHOLE))
    checkpoint.weight(NORM)
    data = bytearray((tmp_path / OTHER).read_bytes())
    data[-1] ^= 1
    (tmp_path / OTHER).write_bytes(data[:size])
    for use in (
        lambda: checkpoint.weight(NORM),
        lambda: checkpoint.rows("lm_head.weight", 0, 2),
        checkpoint.fingerprint,
    ):
        with pytest.raises(CheckpointError, match=f"{OTHER}: changed"):
            use()


def test_a_shard_whose_time_is_set_back_is_not_what_was_hashed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, WHOLE))
    checkpoint.fingerprint()
    before = (tmp_path / OTHER).stat()
    data = bytearray((tmp_path / OTHER).read_bytes())
    data[-1] ^= 1
    (tmp_path / OTHER).write_bytes(data)
    os.utime(tmp_path / OTHER, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError, match=f"{OTHER}: changed"):
        checkpoint.weight(NORM)


def test_a_config_that_changes_after_opening_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, WHOLE))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 1e4}))
    with pytest.raises(ConfigError, match=r"config\.json: changed"):
        checkpoint.fingerprint()


def test_a_tokenizer_that_changes_after_it_was_read_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, WHOLE))
    assert checkpoint.side_file("tokenizer.json") == tmp_path / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_text('{"other": 1}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: changed"):
        checkpoint.fingerprint()


def test_the_index_decides_against_a_stray_single_file(tmp_path: Path) -> None:
    folder = small_model.save(tmp_path, WHOLE)
    save_file(altered(**{NORM: WHOLE[NORM] + 9}), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.shards == (SHARD, OTHER)
    assert np.array_equal(checkpoint.weight(NORM), WHOLE[NORM].float().numpy())
    (said,) = checkpoint.notes
    assert "model.safetensors is not read" in said


def test_an_index_of_one_file_is_no_stray(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(WHOLE, tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(WHOLE, "model.safetensors")}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.shards == ("model.safetensors",)
    assert checkpoint.notes == ()


def test_single_file_and_sides(tmp_path: Path) -> None:
    save_file(WHOLE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    checkpoint: Source = open_checkpoint(tmp_path)
    checkpoint.validate()
    assert checkpoint.shards == ("model.safetensors",)
    assert checkpoint.side_file("tokenizer.json") is None
    with pytest.raises(ValueError, match="not a side file"):
        checkpoint.side_file("../passwd")
    assert set(checkpoint.fingerprint()) == {"config.json", "model.safetensors"}


def test_fingerprint_changes_with_a_byte(tmp_path: Path) -> None:
    before = open_checkpoint(small_model.save(tmp_path / "a", WHOLE)).fingerprint()
    after = open_checkpoint(
        small_model.save(tmp_path / "b", altered(**{NORM: WHOLE[NORM] + 9}))
    ).fingerprint()
    assert [name for name in before if before[name] != after[name]] == [OTHER]


def test_trained_checkpoint() -> None:
    root = os.environ.get("MQ_QUANT_MODELS")
    if not root:
        pytest.skip("MQ_QUANT_MODELS is not set")
    checkpoint = open_checkpoint(Path(root) / "trained-tiny")
    checkpoint.validate()
    for file in checkpoint.shards:
        with safe_open(checkpoint.path / file, "pt") as f:
            assert set(f.keys()) == {n for n, t in checkpoint.tensors.items() if t.shard == file}
    router = "model.layers.3.block_sparse_moe.gate.weight"
    with safe_open(checkpoint.path / checkpoint.tensors[router].shard, "pt") as f:
        assert np.array_equal(checkpoint.weight(router), f.get_tensor(router).numpy())
