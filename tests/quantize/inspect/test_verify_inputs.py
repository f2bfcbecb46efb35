"""`verify` against a source on the hub: nothing is fetched twice, and nothing stays."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import hub_server
import numpy as np
import pytest
from hub_server import REPO, check_each_shard_was_fetched_once
from mq_quant.formats.hfq import open_hfq
from mq_quant.kernels.runtime.host import open_backend
from mq_quant.quantize.inspect.verify_inputs import VerifyOptions, inputs_of
from mq_quant.quantize.pipeline.build import BuildResult
from mq_quant.verify.run import Verification, verify
from mq_quant.verify.stages.predictions import PredictionFigures


@pytest.fixture
def judge(
    run: Callable[..., BuildResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Verification]:
    """Judge a file of the small checkpoint against a source, on 512 tokens."""
    run("out", tier="mq4", fit="reference")
    ids = np.random.default_rng(0).integers(0, 300, (8, 64))
    np.save(tmp_path / "ids.npy", ids)
    monkeypatch.chdir(tmp_path)

    def against(source: str) -> Verification:
        options = VerifyOptions(source=source, token_file=tmp_path / "ids.npy", generate=0)
        with (
            open_hfq(tmp_path / "out") as file,
            open_backend("cpu") as backend,
            closing(inputs_of(file, options)) as inputs,
        ):
            return verify(file, backend, inputs)

    return against


def test_a_source_on_the_hub_is_fetched_once(
    small_hub: hub_server.HubServer,
    judge: Callable[[str], Verification],
    small: Path,
    tmp_path: Path,
) -> None:
    streamed = judge(REPO)
    check_each_shard_was_fetched_once(small_hub)
    found, expected = (v.figures(PredictionFigures) for v in (streamed, judge(str(small))))
    assert found is not None and expected is not None
    assert (found.divergence, found.layers) == (expected.divergence, expected.layers)
    assert found.positions == 512
    names = [stage.name for stage in streamed.stages]
    assert names == ["structure", "decode", "forward", "fidelity", "predictions"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "ids.npy", "out"]
