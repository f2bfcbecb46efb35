"""Tests of evaluations take one thread of torch: the work is so small that threads would wait for each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.evaluate.reference import Reference, of_checkpoint
from mq_quant.quantize.evaluate.result import Evaluation
from mq_quant.quantize.evaluate.run import EvaluateOptions, evaluate_files
from mq_quant.quantize.pipeline.build import BuildResult
from mq_quant.quantize.spec.places import open_place

Evaluate = Callable[..., Evaluation]


@pytest.fixture(autouse=True)
def few_threads(one_thread: None) -> None:
    """Every test here."""


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 300, (4, 24)))
    return path


@pytest.fixture
def made(run: Callable[..., BuildResult], tmp_path: Path) -> Callable[[str], Path]:
    """Build a tier of the small checkpoint by the plainest fit."""

    def build(tier: str) -> Path:
        path = tmp_path / f"small.{tier}"
        if not path.exists():
            run(path.name, tier=tier, fit="reference")
        return path

    return build


@pytest.fixture
def against(small: Path, tokens: Path) -> Callable[..., Reference]:
    """The source on the tokens; it is left open, since tests end soon."""

    def opened(place: Path | str = small, request: TokenRequest | None = None) -> Reference:
        source = open_place(str(place), None, 2, tokens.parent)
        source.validate()
        return of_checkpoint(source, request or TokenRequest(tokens=tokens), source.fingerprint())

    return opened


@pytest.fixture
def evaluate(against: Callable[..., Reference], tmp_path: Path) -> Evaluate:
    """Judge files: evaluate([path, …], name="out.json", reference=…, watch=…, …)."""

    def run_evaluation(
        paths: list[Path], name: str = "out.json", reference: Reference | None = None, **given: Any
    ) -> Evaluation:
        options = EvaluateOptions(**{"output": tmp_path / name} | given)
        return evaluate_files(paths, reference or against(), options)

    return run_evaluation
