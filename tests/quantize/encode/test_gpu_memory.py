"""What the encoder takes of a GPU's memory, by a back end that only counts, against what a plan says of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from mq_quant.formats.blocks import MQ2_LLOYD, MQ3_LLOYD, MQ4
from mq_quant.formats.minimax import ModelConfig, parse_config
from mq_quant.kernels.encode.device_encoder import DeviceEncoder
from mq_quant.kernels.encode.hessians import DenseFactors
from mq_quant.kernels.runtime.host import Backend, Buffer
from mq_quant.quantize.encode import gpu_encoder
from mq_quant.quantize.encode.gpu_encoder import open_gpus
from mq_quant.quantize.encode.on_device.layer import DeviceLayerEncoder
from mq_quant.quantize.spec.calibration_sizes import BESIDE, GPU_STREAMS, gpu_streams, stream_bytes
from mq_quant.quantize.spec.recipe import load_tier

GROUP = 256


class Counting(Backend):
    """Takes no memory and runs nothing, but counts bytes."""

    device = "counts only"

    def __init__(self) -> None:
        super().__init__()
        self.name, self.taken = "counting", 0

    def _alloc(self, nbytes: int) -> tuple[Any, int]:
        self.taken += nbytes
        return None, self.taken

    def synchronize(self) -> None: ...
    def close(self) -> None: ...
    def mark(self) -> Any: ...
    def seconds_between(self, first: Any, last: Any) -> float:
        return 0.0

    def _copy(self, target: int, source: int, nbytes: int) -> None: ...
    def _copy_in(self, address: int, array: Any) -> None: ...
    def _copy_out(self, array: Any, address: int) -> None: ...
    def _dispatch(self, *launch: Any) -> None: ...


def of(backend: Backend, *shape: int) -> Buffer:
    """Memory that somebody else took."""
    return backend.borrowed(None, 1 << 40, shape, np.float32)


def factors(backend: Backend, groups: int, beside: int = 1) -> DenseFactors:
    square, lines = (groups * beside, GROUP, GROUP), (groups, groups * beside, GROUP, GROUP)
    answers = of(backend, groups * (groups - 1) // 2 * beside, GROUP, GROUP)
    return DenseFactors(
        of(backend, *square),
        of(backend, *square),
        answers,
        of(backend, *square),
        of(backend, *lines),
        of(backend, *square),
    )


def held(encoder: DeviceEncoder) -> int:
    return sum(buffer.nbytes for buffer in encoder._space._held.values())


@pytest.fixture(scope="module")
def released() -> ModelConfig:
    return parse_config(load_tier("mq2").model.config)


@pytest.mark.parametrize("fmt", [MQ2_LLOYD, MQ3_LLOYD, MQ4], ids=lambda f: f.name)
def test_a_stream_takes_what_is_planned(released: ModelConfig, fmt: Any) -> None:
    hidden, between = released.hidden_size, released.intermediate_size
    backend = Counting()
    encoder = DeviceEncoder(backend)
    blocks: Sequence[tuple[slice, Buffer]] = [
        (slice(start, start + hidden // 16), of(backend, hidden // 16, start))
        for start in range(0, hidden, hidden // 16)
    ]
    gate_up = of(backend, 2 * between, hidden)
    encoder.encode_here(gate_up, fmt, of(backend, hidden), factors(backend, hidden // GROUP))
    downs, scale = of(backend, hidden, BESIDE * between), of(backend, BESIDE * between)
    encoder.encode_here(downs, fmt, scale, factors(backend, between // GROUP, BESIDE), 1.0, BESIDE, blocks)
    planned = stream_bytes(released)
    assert 0.85 * planned < held(encoder) < 1.1 * planned


def test_as_many_downs_lie_side_by_side_as_are_planned() -> None:
    assert DeviceLayerEncoder.together == BESIDE


@pytest.mark.parametrize(("gigabytes", "share"), [(0, 1), (16, 0.5), (24, 0.5), (32, 1), (141, 1)])
def test_a_small_gpu_has_half_of_the_streams(
    monkeypatch: pytest.MonkeyPatch, gigabytes: int, share: float
) -> None:
    assert gpu_streams(gigabytes * 10**9) == GPU_STREAMS * share
    monkeypatch.setattr(gpu_encoder, "gpu_memory", lambda: gigabytes * 10**9)
    monkeypatch.setattr(gpu_encoder, "open_gpu", lambda *_, **__: Counting())
    encoder = open_gpus("cuda:0")
    assert len(encoder._all) == GPU_STREAMS * share
    encoder.close()
