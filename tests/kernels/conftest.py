"""What the kernel tests share: every back end that this machine has, and payloads of every format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from mq_quant.formats.blocks import BY_NAME, AffineFormat, FloatFormat, Format, LloydFormat
from mq_quant.kernels.runtime.cuda import CudaBackend
from mq_quant.kernels.runtime.hip import HipBackend
from mq_quant.kernels.runtime.host import Backend, open_backend

CPU = {f"cpu-{order}": {"order": order} for order in ("ascending", "descending")}
GPUS = [kind.name for kind in (HipBackend, CudaBackend) if kind.available()]
FORMATS = tuple(BY_NAME)
Payload = Callable[..., np.ndarray[Any, np.dtype[np.uint8]]]


@pytest.fixture(scope="session", params=[*CPU, *GPUS])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    name = request.param
    with open_backend(name.split("-")[0], **CPU.get(name, {})) as opened:
        yield opened


def random_payload(
    fmt: str, weights: int, rng: np.random.Generator, case: str = "random"
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A payload of `weights` weights. Cases: "random"; "zero" (all bytes 0); "constant" (one level in every group);
    "subnormal" (levels below the smallest normal number of their stored type)."""
    kind: Format = BY_NAME[fmt]
    groups = weights // kind.group
    if case == "zero":
        return np.zeros(kind.nbytes(weights), np.uint8)
    tiny = case == "subnormal"
    if isinstance(kind, FloatFormat):
        least = np.finfo(kind.dtype).smallest_subnormal
        values = rng.standard_normal(weights).astype(np.float32)
        if case == "constant":
            values[:] = 0.375
        return kind.pack(np.rint(8 * values) * np.float32(least) if tiny else values).reshape(-1)
    half = np.float16(2.0**-24)
    if isinstance(kind, LloydFormat):
        levels = np.sort(rng.standard_normal((groups, kind.levels)), axis=1).astype(np.float16)
        if tiny:
            levels = np.sort(rng.integers(-9, 9, levels.shape), axis=1).astype(np.float16) * half
        if case == "constant":
            levels[:] = levels[:, :1]
        return kind.pack(levels, rng.integers(0, kind.levels, (groups, 256)).astype(np.uint8)).reshape(-1)
    if isinstance(kind, AffineFormat):
        scale = rng.uniform(0.01, 1, groups).astype(np.float32) * np.float32(2.0**-140 if tiny else 1)
        zero = rng.standard_normal(groups).astype(np.float32) * np.float32(2.0**-140 if tiny else 1)
        scale *= case != "constant"
        return kind.pack(scale, zero, rng.integers(0, kind.levels, (groups, 256)).astype(np.uint8)).reshape(
            -1
        )
    scale = np.full(groups, half) if tiny else rng.uniform(0.001, 0.1, groups).astype(np.float16)
    codes = rng.integers(-128, 128, (groups, 32)).astype(np.int8)
    return kind.pack(scale, codes * 0 + np.int8(77) if case == "constant" else codes).reshape(-1)


@pytest.fixture(scope="session")
def payload() -> Payload:
    return random_payload


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)
