"""Trained models from a hub: read once, equal to single evaluations, and to transformers' own forward."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import hub_server
import numpy as np
import pytest
import torch
from hub_server import MAIN, REPO, check_each_shard_was_fetched_once
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.hfq import open_hfq
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.evaluate.reference import Reference
from mq_quant.quantize.evaluate.result import Evaluation
from mq_quant.quantize.pipeline.build import BuildResult
from mq_quant.quantize.pipeline.statistics import ImatrixFile
from mq_quant.verify.model.hfq_weights import DecodedFile
from mq_quant.verify.model.metrics import Divergence
from transformers_model import huggingface

MODELS = os.environ.get("MQ_QUANT_MODELS")
pytestmark = pytest.mark.skipif(MODELS is None, reason="MQ_QUANT_MODELS names no trained checkpoints")


@pytest.mark.filterwarnings("ignore:.*token_id must be")
@pytest.mark.parametrize("name", ["trained-tiny", "trained-wide"])
def test_a_trained_model(
    name: str,
    run: Callable[..., BuildResult],
    small_hub: hub_server.HubServer,
    against: Callable[..., Reference],
    evaluate: Callable[..., Evaluation],
    tmp_path: Path,
) -> None:
    folder = Path(str(MODELS)) / name
    given = {"source": folder, "statistics": ImatrixFile(folder / "imatrix.gguf"), "fit": "reference"}
    files = [run(f"{name}.{tier}", tier=tier, **given).path for tier in ("mq4", "mq2-mini")]
    small_hub.repositories[REPO] = {MAIN: hub_server.repository(folder)}
    ids = np.load(folder / "eval_tokens.npy")[:2, :64]
    np.save(tmp_path / "ids.npy", ids)
    request = TokenRequest(tokens=tmp_path / "ids.npy")
    together = evaluate(files, reference=against(REPO, request))
    check_each_shard_was_fetched_once(small_hub)
    alone = evaluate(files[1:], name="alone.json", reference=against(folder, request))
    assert alone.files == together.files[1:]

    checkpoint, expected = open_checkpoint(folder), Divergence()
    with open_hfq(files[1]) as file, torch.no_grad():
        models = huggingface(checkpoint), huggingface(checkpoint, DecodedFile(file))
        for sequence in ids:
            a, b = (model(torch.from_numpy(sequence.astype(np.int64))[None]).logits[0] for model in models)
            expected.add(a, b, sequence)
    for key, value in vars(expected.summary()).items():
        assert getattr(alone.files[0].divergence, key) == pytest.approx(value, abs=1e-4), key
