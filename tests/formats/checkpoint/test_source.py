"""Checkpoints: every way one can be broken, by name; then what is read against safetensors itself."""

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
from mq_quant.formats.checkpoint.source import Source, open_checkpoint
from mq_quant.formats.errors import CheckpointError, ConfigError, WeightError
from safetensors import safe_open
from safetensors.torch import save_file
from small_model import CONFIG, W1, W1_SCALE, Tensors

WHOLE = small_model.tensors()
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def altered(**changes: torch.Tensor | None) -> Tensors:
    """The whole checkpoint with some tensors replaced, added, or (None) left out."""
    return {n: t for n, t in (WHOLE | changes).items() if t is not None}


INVENTORY: dict[str, tuple[Tensors, str, str]] = {
    "weight missing": (altered(**{NORM: None}), NORM, "is missing"),
    "unknown tensor": (altered(extra=torch.zeros(3)), "extra", "not a tensor of this model"),
    "FP8 without scale": (altered(**{W1_SCALE: None}), W1, "its scale .* is missing"),
    "scale without weight": (
        altered(**{"model.layers.0.mlp.weight_scale_inv": torch.ones(1, 1)}),
        "model.layers.0.mlp.weight_scale_inv",
        "scale without its weight",
    ),
    "scale of a plain weight": (
        altered(**{NORM + "_scale_inv": torch.ones(1, 1)}),
        NORM + "_scale_inv",
        "scales a weight that is not FP8",
    ),
    "scale of another shape": (altered(**{W1_SCALE: torch.ones(2, 1)}), W1_SCALE, r"F32 \[2, 2\]"),
    "scale of another dtype": (altered(**{W1_SCALE: torch.ones(2, 2).half()}), W1_SCALE, "is F16"),
    "weight of another shape": (altered(**{NORM: torch.zeros(255)}), NORM, r"has shape \[255\]"),
    "weight of another dtype": (altered(**{NORM: torch.zeros(256).half()}), NORM, "is F16"),
    "FP8 where none belongs": (
        altered(**{NORM: torch.zeros(256).to(torch.float8_e4m3fn)}),
        NORM,
        "is F8_E4M3",
    ),
    "plain where FP8 belongs": (altered(**{W1: torch.zeros(256, 256), W1_SCALE: None}), W1, "is F32, not F8"),
}


@pytest.mark.parametrize("case", INVENTORY)
def test_inventory(case: str, tmp_path: Path) -> None:
    content, name, text = INVENTORY[case]
    checkpoint = open_checkpoint(small_model.save(tmp_path, content))
    with pytest.raises(CheckpointError, match=text) as e:
        checkpoint.validate()
    assert e.value.tensor == name


def test_many_problems_are_listed_and_bounded(tmp_path: Path) -> None:
    config = CONFIG | {"num_hidden_layers": 2**30}
    checkpoint = open_checkpoint(small_model.save(tmp_path, WHOLE, config=config))
    with pytest.raises(CheckpointError, match=r"layers\.2\.input_layernorm\.weight: is missing") as e:
        checkpoint.validate()
    assert "and more" in str(e.value)


def test_experts_and_layers_against_the_config(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, WHOLE, config=CONFIG | {"num_local_experts": 2}))
    with pytest.raises(CheckpointError, match=r"experts\.2\.w1\.weight: is not a tensor"):
        checkpoint.validate()


def test_mtp_tensors_are_skipped_and_counted(tmp_path: Path) -> None:
    mtp = {
        "mtp.head.weight": torch.zeros(2),
        "model.layers.2.self_attn.q_proj.weight_scale_inv": torch.ones(1, 1),
    }
    checkpoint = open_checkpoint(small_model.save(tmp_path, WHOLE | mtp))
    checkpoint.validate()
    assert set(checkpoint.skipped_mtp) == set(mtp)


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
    "empty shard": (cut(0), CheckpointError, "not a safetensors file"),
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


def poisoned(name: str, value: float | int) -> Tensors:
    tensor = WHOLE[name].clone()
    flat = tensor.view(-1)
    if tensor.dtype == torch.float8_e4m3fn:
        flat.view(torch.uint8)[7] = int(value)
    else:
        flat[1] = value
    return altered(**{name: tensor})


@pytest.mark.parametrize(
    ("stored", "asked", "value", "text"),
    [
        (W1, W1, 0x7F, "1 NaN codes"),
        (W1, W1, 0xFF, "1 NaN codes"),
        (W1_SCALE, W1, float("nan"), "not finite"),
        (W1_SCALE, W1, float("inf"), "not finite"),
        (W1_SCALE, W1, 3e38, "overflows"),
        (NORM, NORM, float("-inf"), "1 of 256 values are not finite"),
        ("model.layers.0.block_sparse_moe.gate.weight",) * 2 + (float("nan"), "1 of 768 values"),
    ],
)
def test_poisoned_values(stored: str, asked: str, value: float, text: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, poisoned(stored, value)))
    checkpoint.validate()
    with pytest.raises(WeightError, match=text) as e:
        checkpoint.weight(asked)
    assert e.value.tensor == asked
    assert ".safetensors" in (e.value.file or "")


def test_weight_of_no_tensor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, altered(count=torch.ones(2, dtype=torch.int32))))
    with pytest.raises(CheckpointError, match="no such tensor"):
        checkpoint.weight("nowhere")
    with pytest.raises(WeightError, match="is I32"):
        checkpoint.weight("count")


def test_unvalidated_fp8_without_scale_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, altered(**{W1_SCALE: None})))
    with pytest.raises(WeightError, match="without an F32 block scale"):
        checkpoint.weight(W1)


def test_shard_cut_after_opening(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, WHOLE))
    os.truncate(tmp_path / OTHER, 5000)
    with pytest.raises(CheckpointError, match="ends inside this tensor"):
        checkpoint.weight(NORM)


def reference(content: Tensors, name: str) -> np.ndarray:
    weight = content[name].float()
    scale = content.get(name + "_scale_inv")
    if scale is not None:
        rows, cols = weight.shape
        weight = weight * scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    return weight.numpy()


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_weights(shards: int, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_model.save(tmp_path, WHOLE, shards))
    checkpoint.validate()
    assert len(checkpoint.shards) == shards
    for name in (n for n in WHOLE if not n.endswith("_scale_inv")):
        weight = checkpoint.weight(name)
        assert weight.dtype == np.float32
        assert np.array_equal(weight, reference(WHOLE, name)), name


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
    after = open_checkpoint(small_model.save(tmp_path / "b", poisoned(NORM, 9))).fingerprint()
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
