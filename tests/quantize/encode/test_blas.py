"""A factorisation under workers has one thread, and so the same bits on every machine of a kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mq_quant.lloyd.hessian.row import from_moment
from mq_quant.quantize.encode import blas
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


@dataclass
class Library:
    """What threadpoolctl says of a library, and what was asked of it."""

    filepath: str
    user_api: str = "blas"
    num_threads: int = 8
    asked: list[int] = field(default_factory=list)

    def set_num_threads(self, count: int) -> None:
        self.asked.append(count)


def test_only_what_came_with_torch_keeps_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the whole environment lies in a folder of that name."""
    packages = tmp_path / "torch" / "env" / "site-packages"
    places = ("numpy.libs", "scipy.libs", "torch/lib", "torch.libs")
    numpy_s, scipy_s, *torch_s = (Library(str(packages / place / "libblas.so")) for place in places)
    openmp = Library(str(packages / "numpy.libs" / "libgomp.so"), "openmp")
    loaded = SimpleNamespace(lib_controllers=[numpy_s, scipy_s, *torch_s, openmp])
    monkeypatch.setattr(blas, "ThreadpoolController", lambda: loaded)
    spec = SimpleNamespace(origin=str(packages / "torch" / "__init__.py"))
    monkeypatch.setattr(blas, "find_spec", lambda name: spec if name == "torch" else None)
    with one_blas_thread():
        assert numpy_s.asked == scipy_s.asked == [1]
    assert numpy_s.asked == scipy_s.asked == [1, 8]
    assert not any(library.asked for library in (*torch_s, openmp))
