"""Workers: what the hooks see, and what workers find."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from build_hooks import StopError
from mq_quant.quantize.pipeline.build import BuildResult
from mq_quant.quantize.pipeline.work_units import WorkUnit
from mq_quant.quantize.write.journal import read_journal
from mq_quant.quantize.write.partial_file import JOURNAL
from threadpoolctl import threadpool_info, threadpool_limits
from watching import Heard

Run = Callable[..., BuildResult]


def blas_threads() -> set[int]:
    return {found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"}


def test_units_are_encoded_with_one_blas_thread_a_worker(run: Run) -> None:
    seen: set[int] = set()
    with threadpool_limits(3, user_api="blas"):
        run(on_begin=lambda unit: seen.update(blas_threads()))
        assert blas_threads() == {3}
    assert seen == {1}


def test_hooks_see_every_unit_once_before_it_is_encoded_and_when_it_stands(run: Run, tmp_path: Path) -> None:
    heard = Heard()
    begun: list[WorkUnit] = []
    done: list[WorkUnit] = []
    threads: set[str] = set()

    def on_begin(unit: WorkUnit) -> None:
        threads.add(threading.current_thread().name)
        begun.append(unit)

    def on_done(unit: WorkUnit) -> None:
        assert threading.current_thread() is threading.main_thread()
        assert read_journal(tmp_path / f"out{JOURNAL}")[0][-1]["unit"] == unit.key
        assert unit in begun
        done.append(unit)

    result = run(watch=heard, on_begin=on_begin, on_done=on_done)
    weights = sum(unit.weights for unit in done)
    assert heard.phase("encoding") == (weights, 0, weights)
    total, _, hashed = heard.phase("hashing the source")
    assert total == hashed > 0
    assert len(done) == result.units == len(begun) and set(done) == set(begun)
    assert all(name.startswith("encode") for name in threads)


@pytest.mark.parametrize("hook", ["watch", "on_begin", "on_done"])
def test_a_hook_that_raises_ends_the_build_which_can_be_continued(
    hook: str, run: Run, tmp_path: Path
) -> None:
    calls = 0

    def stop(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise StopError

    def at_once(doing: str) -> None:
        if doing == "encoding":
            raise StopError

    whole = run("whole")
    with pytest.raises(StopError):
        run(**{hook: Heard(then=at_once) if hook == "watch" else stop})
    heard = Heard()
    result = run(watch=heard)
    assert result.resumed_units == {"watch": 0, "on_done": 10}.get(hook, result.resumed_units)
    total, there, counted = heard.phase("encoding")
    assert (there > 0) == (hook != "watch") and total > there and counted == total
    assert ("checking what stands" in [phase for phase, *_ in heard.phases]) == (hook != "watch")
    assert result.quantization_hash == whole.quantization_hash
