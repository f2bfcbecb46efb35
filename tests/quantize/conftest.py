"""The smallest checkpoint with an imatrix of its own, and builds of it in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_model
from mq_quant.formats.imatrix import ImatrixEntry, write_imatrix
from mq_quant.quantize.build import Options, build
from mq_quant.quantize.job import Changes, open_job
from mq_quant.quantize.sources import choose_recipe

Build = Callable[..., dict[str, Any]]


def save_imatrix(path: Path, seed: int = 0, layers: int = 2, experts: int = 3, width: int = 256) -> Path:
    """An imatrix for small_model.CONFIG whose channels differ in energy by orders of magnitude."""
    random = np.random.default_rng(seed)
    names = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    entries = {
        f"blk.{layer}.{name}.weight": ImatrixEntry(
            np.exp(random.normal(0, 1.5, (experts, width))).astype(np.float32), np.full(experts, 500.0)
        )
        for layer in range(layers)
        for name in names
    }
    write_imatrix(path, entries, ["random"], 1, 512)
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_model.save(tmp_path_factory.mktemp("models") / "small", small_model.tensors())
    save_imatrix(folder / "imatrix.gguf")
    return folder


@pytest.fixture
def run(small: Path, tmp_path: Path) -> Build:
    """Build a tier of the small checkpoint: run("out.mq2", tier="mq2", fit="exact", jobs=2, …).

    The AWQ exponent is pinned unless a test gives `alpha`: searching it is most of the work at this size.
    """

    def run_build(
        name: str = "out",
        tier: str = "mq2",
        source: Path = small,
        jobs: int = 2,
        force: bool = False,
        restart: bool = False,
        **changes: Any,
    ) -> dict[str, Any]:
        given = Changes(**({"imatrix": small / "imatrix.gguf", "alpha": 0.3} | changes))
        options = Options(tmp_path / name, jobs, force, restart, quiet=True)
        with open_job(choose_recipe(tier, None, str(source)), given, options.check) as job:
            return build(job, options)

    return run_build
