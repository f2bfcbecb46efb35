"""Calibrated builds of the tiny source whose hashes are committed, and what tells a machine on which they hold.

Sums of torch and LAPACK differ between processors, so hashes of calibrated files hold on one kind of machine. `probe`
makes sums like theirs: where it gives what is committed beside the hashes, the hashes have to hold too.

    python tests/calibrated_hashes.py

writes both anew, after a change that is meant to alter bytes.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mq_quant.formats.lapack import cholesky
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.statistics import OnTheFly
from mq_quant.quantize.spec.places import TINY
from mq_quant.quantize.spec.recipe import load_tier
from threadpoolctl import threadpool_limits

PATH = Path(__file__).parent / "golden" / "calibrated.json"
TIERS = ("mq2-lloyd", "mq3")
"""Together they have gate, up and down in 2, 3 and 4 bits."""


def probe() -> str:
    """A hash of products in f32 and f64 and of a factor, of fixed numbers, for any number of threads."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with threadpool_limits(1):
            return _probe()
    finally:
        torch.set_num_threads(threads)


def _probe() -> str:
    rows = np.random.default_rng(0).standard_normal((1024, 512)).astype(np.float32)
    x = torch.from_numpy(rows)
    moment = rows.astype(np.float64).T @ rows
    factor = moment.copy()
    assert cholesky(factor)
    parts = (
        (x @ x[:512].T).softmax(-1).numpy(),
        torch.nn.functional.silu(x).numpy(),
        (x.double().T @ x.double()).numpy(),
        moment,
        factor,
    )
    digest = hashlib.sha256(torch.__version__.encode())
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def built(tier: str, output: Path) -> str:
    """The quantization hash of a calibrated build on four sequences of 128 tokens of the package's own text."""
    statistics = OnTheFly(TokenRequest(sequences=4, length=128))
    return build_file(load_tier(tier, TINY), statistics, RunOptions(output, jobs=2)).quantization_hash


def committed() -> dict[str, Any]:
    """What stands in the repository."""
    content: dict[str, Any] = json.loads(PATH.read_text())
    return content


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tiers = {tier: built(tier, Path(folder) / tier) for tier in TIERS}
    PATH.write_text(json.dumps({"probe": probe(), "tiers": tiers}, indent=1) + "\n")


if __name__ == "__main__":
    main()
