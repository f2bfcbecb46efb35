"""The engine: what its workers find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from mq_quant.quantize.pipeline import worker_pool as engine
from threadpoolctl import threadpool_info, threadpool_limits

Build = Callable[..., dict[str, Any]]


def blas_threads() -> set[int]:
    return {found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"}


def test_units_are_encoded_with_one_blas_thread_a_worker(run: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, seen = engine.encode_unit, set()

    def watched(*args: Any) -> engine.Encoded:
        seen.update(blas_threads())
        return encode(*args)

    monkeypatch.setattr(engine, "encode_unit", watched)
    with threadpool_limits(3, user_api="blas"):
        run()
        assert blas_threads() == {3}
    assert seen == {1}
