"""A factorisation under workers has one thread, and so the same bits on every machine of a kind."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from mq_quant.lloyd.hessian.row import from_moment
from mq_quant.quantize.encode.blas import one_blas_thread
from threadpoolctl import threadpool_info, threadpool_limits


def blas_threads() -> set[int]:
    return {found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"}


@pytest.fixture(params=[1, 2, 3])
def allowed(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads of BLAS, as on a machine of as many cores."""
    with threadpool_limits(request.param, user_api="blas"):
        yield request.param


def test_a_factorisation_is_the_same_whatever_the_machine_has(allowed: int) -> None:
    """At this size OpenBLAS cuts a matrix otherwise for one thread than for two."""
    columns = 1024
    inputs = np.random.default_rng(0).integers(-3, 4, (columns, columns)).astype(np.float64)
    moment = inputs @ inputs.T / columns + np.eye(columns)  # of whole numbers, and so exact
    with threadpool_limits(1, user_api="blas"):
        expected = from_moment(moment)
    with one_blas_thread():
        made = from_moment(moment)
    assert [g.matrix.tobytes() for g in made.groups] == [g.matrix.tobytes() for g in expected.groups]
    assert [a.tobytes() for a in made.answers] == [a.tobytes() for a in expected.answers]


def test_the_threads_come_back_whatever_happens(allowed: int) -> None:
    with pytest.raises(RuntimeError, match="broken"), one_blas_thread():
        assert blas_threads() == {1}
        raise RuntimeError("broken")
    assert blas_threads() == {allowed}
