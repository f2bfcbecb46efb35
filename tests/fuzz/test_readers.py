"""Mutated files against every reader: whatever the bytes, only errors of ours come out, and memory stays bounded.

The number of inputs is small by default; MQ_QUANT_FUZZ=100000 before `pytest tests/fuzz` tries as many as one likes.
"""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import small_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.errors import MqError
from mq_quant.formats.hfq import open_hfq, quantization_hash
from mq_quant.formats.minimax import parse_config
from mq_quant.formats.statistics.imatrix import (
    GGUF_NAMES,
    ImatrixEntry,
    check_imatrix,
    coverage,
    read_imatrix,
    write_imatrix,
)

INPUTS = int(os.environ.get("MQ_QUANT_FUZZ", "300"))
MEMORY = 1 << 30
GOLDEN = Path(__file__).parents[1] / "golden" / "container.hfq"
MODEL = parse_config(small_model.CONFIG)

Mutation = Callable[[bytearray], None]

TOKENS = [
    *(b'{ } [ ] " \\ , : \\" {} [] "a":1, null -1 1e999 NaN \\ud800'.split(b" ")),
    b"[" * 5000,
    b'{"a":' * 3000,
    b"9" * 5000,
    b"\xff\xfe",
    b"../x.safetensors",
    b"\0",
]
NUMBERS = [
    n.to_bytes(width, "little")
    for width in (1, 2, 4, 8)
    for n in (0, 1, 1 << 8 * width - 1, (1 << 8 * width) - 1, (1 << 8 * width - 1) - 1, 1 << 4 * width)
]


@st.composite
def mutations(draw: st.DrawFn) -> Mutation:
    """One change at a relative place; heads of files, where the structure is, are hit more often."""
    kind = draw(st.sampled_from(["bit", "number", "token", "cut", "delete", "repeat", "move"]))
    place = draw(st.floats(0, 1)) ** draw(st.sampled_from([1, 3, 6]))
    bit, span = draw(st.integers(0, 7)), draw(st.integers(1, 64))
    value = draw(st.sampled_from(NUMBERS if kind == "number" else TOKENS))

    def apply(data: bytearray) -> None:
        at = min(int(place * len(data)), max(len(data) - 1, 0))
        if kind == "bit" and data:
            data[at] ^= 1 << bit
        elif kind == "number":
            data[at : at + len(value)] = value
        elif kind == "token":
            data[at : at + span % 9] = value
        elif kind == "cut":
            del data[at:]
        elif kind == "delete":
            del data[at : at + span]
        elif kind == "repeat":
            data[at:at] = data[at : at + span]
        elif kind == "move":
            data[at : at + span] = data[at : at + span][::-1]

    return apply


def read_hfq(folder: Path) -> None:
    with open_hfq(folder / "x.hfq") as f:
        quantization_hash(f)


def read_matrix(folder: Path) -> None:
    imatrix = read_imatrix(folder / "x.imatrix")
    for entry in imatrix.entries.values():
        assert entry.sum2_mean.shape == (len(entry.counts), entry.sum2_mean.shape[1])
    check_imatrix(imatrix, MODEL)
    coverage(imatrix, MODEL)


def read_model(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.tensors:
        if len(name) % 7 == 0:
            checkpoint.weight(name)
    checkpoint.validate()


def statistics() -> dict[str, ImatrixEntry]:
    shape = (MODEL.num_local_experts, MODEL.hidden_size)
    mean = np.random.default_rng(0).random(shape, np.float32)
    names = (f"blk.{layer}.{name}.weight" for layer in range(2) for name in GGUF_NAMES.values())
    return {name: ImatrixEntry(mean, np.ones(shape[0])) for name in names}


def imatrix_bytes(folder: Path) -> bytes:
    write_imatrix(folder / "x.imatrix", statistics(), ["text"], 1, 8)
    return (folder / "x.imatrix").read_bytes()


def dat_bytes(folder: Path) -> bytes:
    out = struct.pack("<i", 6)
    for name, entry in statistics().items():
        values = entry.sum2_mean.astype("<f4").tobytes()
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, len(values) // 4) + values
    return out + struct.pack("<ii", 3, 4) + b"text"


def model_file(name: str) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        return (small_model.save(folder, small_model.tensors()) / name).read_bytes()

    return make


SHARD = "model-00001-of-00002.safetensors"
TARGETS: dict[str, tuple[str, Callable[[Path], bytes], Callable[[Path], None]]] = {
    "hfq": ("x.hfq", lambda folder: GOLDEN.read_bytes(), read_hfq),
    "gguf": ("x.imatrix", imatrix_bytes, read_matrix),
    "dat": ("x.imatrix", dat_bytes, read_matrix),
    "shard": (SHARD, model_file(SHARD), read_model),
    "index": ("model.safetensors.index.json", model_file("model.safetensors.index.json"), read_model),
    "config": ("config.json", model_file("config.json"), read_model),
}


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """Any reader that asks for another GiB gets a MemoryError, which is no error of ours."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.usefixtures("bounded_memory")
def test_only_our_errors(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, make, read = TARGETS[target]
    seed = make(tmp_path)
    tried = refused = 0

    @given(st.lists(mutations(), min_size=1, max_size=4))
    @settings(max_examples=INPUTS, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def attack(changes: list[Mutation]) -> None:
        nonlocal tried, refused
        data = bytearray(seed)
        for change in changes:
            change(data)
        (tmp_path / file).write_bytes(data)
        tried += 1
        try:
            read(tmp_path)
        except MqError as e:
            refused += 1
            assert str(e)

    attack()
    with capsys.disabled():
        print(f"\nfuzz {target}: {tried} inputs, {refused} refused, 0 crashes")
    assert tried >= min(INPUTS, 50)
    assert refused
