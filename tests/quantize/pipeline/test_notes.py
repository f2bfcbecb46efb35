"""What rounding fell back on reaches the file: in fixed words, whatever the threads and interruptions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_hooks import stopped
from mq_quant.formats.hfq import open_hfq
from mq_quant.lloyd.hessian.row import from_moment
from mq_quant.quantize.encode import layer_encoder as encode
from mq_quant.quantize.pipeline.build import BuildResult
from mq_quant.quantize.pipeline.notes import SHOWN, SHOWN_EXPERTS, sentences, with_notes
from mq_quant.quantize.pipeline.statistics import NoStatistics

Run = Callable[..., BuildResult]


def test_experts_with_the_same_note_share_a_sentence_in_ascending_order() -> None:
    notes = {5: {"w2": ["a"]}, 0: {"w2": ["a", "b"], "w1": ["b"]}, 3: {}}
    assert sentences(7, notes, 16) == [
        "layer 7 w1: experts 0: b",
        "layer 7 w2: experts 0, 5: a",
        "layer 7 w2: experts 0: b",
    ]
    assert sentences(7, {}, 16) == []


def test_many_experts_are_counted_and_all_of_them_are_called_all() -> None:
    many = {e: {"w3": ["a"]} for e in range(20)}
    assert sentences(0, many, 20) == ["layer 0 w3: all experts: a"]
    (one,) = sentences(0, many, 21)
    assert one == "layer 0 w3: experts 0, 1, 2, 3, 4, 5, 6, 7, … (20): a" and SHOWN_EXPERTS == 8


def test_a_layer_never_says_more_than_the_metadata_has_room_for() -> None:
    said = sentences(0, {e: {"w2": [f"note {e}"]} for e in range(SHOWN)}, 99)
    assert len(said) == SHOWN and said[-1].endswith(f"note {SHOWN - 1}")
    said = sentences(0, {e: {"w2": [f"note {e}"]} for e in range(256)}, 256)
    assert len(said) == SHOWN and said[-1] == f"layer 0: {256 - SHOWN + 1} more kinds of fallback"


def test_what_the_report_says_comes_first() -> None:
    report = {"layer": 2, "alpha": 0.5, "fallbacks": ["from the imatrix"]}
    got = with_notes(report, {1: {"w2": ["damped"]}}, 3)
    assert got == {**report, "fallbacks": ["from the imatrix", "layer 2 w2: experts 1: damped"]}


@pytest.fixture
def damped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Hessian says that it was damped; those of down, which have no scale, in words of their own."""
    real = encode.hessian_of

    def noted(importance: Any, scale: Any) -> Any:
        return replace(real(importance, scale), notes=("damped" if scale is None else "damped further",))

    monkeypatch.setattr(encode, "hessian_of", noted)


SAID = [
    f"layer {layer} {p}: all experts: {note}"
    for layer in range(2)
    for p, note in (("w1", "damped further"), ("w2", "damped"), ("w3", "damped further"))
]


@pytest.mark.usefixtures("damped")
def test_notes_reach_the_file_whatever_the_threads(run: Run, tmp_path: Path) -> None:
    for jobs in (1, 3):
        assert list(run(str(jobs), jobs=jobs).fallbacks) == SAID
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()
    with open_hfq(tmp_path / "1") as file:
        layers = file.metadata["mq_quant"]["layers"]
    assert [note for layer in layers for note in layer["fallbacks"]] == SAID


@pytest.mark.usefixtures("damped")
def test_notes_of_an_earlier_run_are_not_lost(run: Run, tmp_path: Path) -> None:
    run("whole")
    with stopped(at="layer 1 expert 1") as begun:
        run("out", jobs=1, on_begin=begun)
    again = run("out", jobs=1)
    assert again.resumed_units >= len(begun.units) - 3 and list(again.fallbacks) == SAID
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_without_an_importance_there_is_nothing_to_say(run: Run) -> None:
    assert run(statistics=NoStatistics(), alpha=None).fallbacks == ()


def test_a_moment_that_is_not_usable_says_so() -> None:
    assert from_moment(np.full((256, 256), np.nan)).notes == (
        "second moment is not usable: rounded to nearest",
    )
