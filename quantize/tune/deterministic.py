"""torch so that the same work gives the same bits when it is done again with the same libraries and kind of device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic as _settings

from ...formats.machine import offer

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_FILL = "fill_uninitialized_memory"
"""With it torch fills every new tensor before it is computed: a sixth of the time, for nothing."""


@contextmanager
def coarse_products(device: torch.device) -> Iterator[None]:
    """In the whole process, torch's products on a GPU take ten bits of what they multiply where it has units for that.

    Good enough for the direction of a step; what is judged and what is stored is computed in full. A CPU goes on as
    before.
    """
    if device.type == "cpu":
        yield
        return
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def step_dtype(device: torch.device) -> torch.dtype:
    """What experts' products multiply while a layer is trained: on a GPU bf16, half as many bytes as f32."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@contextmanager
def deterministic() -> Iterator[None]:
    """In the whole process, torch takes algorithms with a fixed order of sums, and products in full f32.

    cuBLAS has a fixed order only where its workspaces have fixed sizes, which it takes from the environment.
    """
    # Not by use_deterministic_algorithms, which loads torch's compiler: three seconds, for nothing.
    before = torch.get_deterministic_debug_mode()
    precision, filled = torch.get_float32_matmul_precision(), getattr(_settings, _FILL)
    offer(_CUBLAS, ":4096:8")
    try:
        torch.set_deterministic_debug_mode("error")
        torch.set_float32_matmul_precision("highest")
        setattr(_settings, _FILL, False)
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.set_float32_matmul_precision(precision)
        setattr(_settings, _FILL, filled)
