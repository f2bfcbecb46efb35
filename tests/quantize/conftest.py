"""The smallest checkpoint with an imatrix of its own, and builds of it in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_model
from mq_quant.quantize.encode.encoders import CPU, Encoder
from mq_quant.quantize.pipeline.build import Options, build
from mq_quant.quantize.pipeline.build_spec import Changes, open_job
from mq_quant.quantize.spec.places import choose_recipe
from small_imatrix import save_imatrix

Build = Callable[..., dict[str, Any]]


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
        coder: Encoder = CPU,
        fold_down: float = 0.0,
        **changes: Any,
    ) -> dict[str, Any]:
        given = Changes(**({"imatrix": small / "imatrix.gguf", "alpha": 0.3} | changes))
        options = Options(tmp_path / name, jobs, force, restart, quiet=True, coder=coder)
        recipe = choose_recipe(tier, None, str(source))
        folded = recipe.model_copy(update={"awq": recipe.awq.model_copy(update={"fold_down": fold_down})})
        with open_job(folded, given, options.check) as job:
            return build(job, options)

    return run_build
