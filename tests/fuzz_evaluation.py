"""Good files of an evaluation for the fuzzer, and how they are read: saved predictions, llama.cpp's, and results."""

from __future__ import annotations

import json
from pathlib import Path

from linear_heads import VOCABULARY, heads
from llama_base_file import written
from mq_quant.quantize.evaluate.result import EvaluatedFile, Evaluation, TokensRecord, read_evaluation
from mq_quant.verify.evaluate.dense import of_source
from mq_quant.verify.evaluate.head import judge
from mq_quant.verify.evaluate.llama_base import open_llama_base
from mq_quant.verify.evaluate.saved_reference import encode_reference, open_reference
from mq_quant.verify.model.metrics import DivergenceSummary, LayerFigures


def saved_reference(folder: Path) -> bytes:
    """The predictions of a model that is nothing but a head."""
    reference, _, tokens = heads()
    comparison = of_source(reference, tokens, VOCABULARY, 0)
    judge(comparison, [])
    return b"".join(encode_reference(reference, comparison.totals, tokens, VOCABULARY, {"text": "abc"}))


def read_saved_reference(folder: Path) -> None:
    opened = open_reference(folder / "x.reference")
    judge(of_source(opened, opened.tokens, opened.vocabulary, 0), [])


def llama_base(folder: Path) -> bytes:
    """The same, as llama.cpp saves it."""
    return written(folder / "x.base", 1.0)[0].read_bytes()


def read_llama_base(folder: Path) -> None:
    base = open_llama_base(folder / "x.base")
    judge(base.comparison(0), [])


def evaluation(folder: Path) -> bytes:
    """The result of one file with one layer."""
    figures = DivergenceSummary(9, 0.1, 0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 0.8, 7.0, 0.1, 7.1, 0.1)
    file = EvaluatedFile(
        "x.mq2", "mq2", 1000, "0" * 16, figures, 65536, (LayerFigures(0, 0.9, 0.8, 0.1, 1.0),)
    )
    tokens = TokensRecord("ab" * 32, 1, 9)
    found = Evaluation({"version": "1"}, {"folder": "x"}, "source", tokens, (file,), ("a note",), 0, 1.5, 10)
    return json.dumps(found.as_json()).encode()


def read_result(folder: Path) -> None:
    read_evaluation(folder / "x.json").as_json()
