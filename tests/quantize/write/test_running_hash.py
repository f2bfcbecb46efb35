"""The running hash: the same in whatever order ranges are written, and never ahead of the bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.hfq import QuantizationHash, TensorMeta
from mq_quant.quantize.write.running_hash import RunningHash


@dataclass(frozen=True)
class Bytes:
    key: str
    start: int
    nbytes: int

    def meta(self) -> TensorMeta:
        return TensorMeta(self.key, 1, (self.nbytes,), 1, self.nbytes)


def cut(name: str, sizes: list[int]) -> list[Bytes]:
    starts = np.cumsum([0, *sizes]).tolist()
    return [
        Bytes(f"{name}{i}", start, size) for i, (start, size) in enumerate(zip(starts, sizes, strict=False))
    ]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_any_order_and_any_cut_give_the_hash_of_the_file(tensors, ranges, chance) -> None:
    total = max(sum(tensors), sum(ranges))
    tensors[-1] += total - sum(tensors)
    ranges[-1] += total - sum(ranges)
    whole, pieces = cut("t", tensors), cut("r", ranges)
    data = np.random.default_rng(total).integers(0, 256, total, np.uint8).tobytes()
    written = bytearray(total)
    there = [False] * total

    def read(start: int, nbytes: int) -> bytes:
        assert all(there[start : start + nbytes])
        return bytes(written[start : start + nbytes])

    running = RunningHash(pieces, whole, read)
    chance.shuffle(order := list(pieces))
    for each in order:
        stop = each.start + each.nbytes
        written[each.start : stop] = data[each.start : stop]
        there[each.start : stop] = [True] * each.nbytes
        running.advance(each.key)
    expected = QuantizationHash()
    for t in whole:
        expected.update(t.meta(), [data[t.start : t.start + t.nbytes]])
    assert running.quantization_hash == expected.hexdigest
    assert running.checksums == [xxhash.xxh64_hexdigest(data[t.start : t.start + t.nbytes]) for t in whole]
