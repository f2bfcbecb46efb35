"""The smallest checkpoint with an imatrix of its own, and builds of it in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
import small_model
import torch
from hub_server import MAIN, REPO
from huggingface_hub import constants
from mq_quant.quantize.pipeline.build import BuildResult, RunOptions, build_file
from mq_quant.quantize.pipeline.build_spec import RecipeChanges
from mq_quant.quantize.pipeline.statistics import ImatrixFile, Statistics
from mq_quant.quantize.spec.places import choose_recipe
from small_imatrix import save_imatrix

Run = Callable[..., BuildResult]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch takes one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_model.save(tmp_path_factory.mktemp("models") / "small", small_model.tensors())
    save_imatrix(folder / "imatrix.gguf")
    return folder


@pytest.fixture
def run(small: Path, tmp_path: Path) -> Run:
    """Build a tier of the small checkpoint: run("out.mq2", tier="mq2", fit="exact", jobs=2, on_begin=hook, …).

    Statistics are the checkpoint's imatrix. The AWQ exponent is pinned unless a test gives `alpha`: searching it is
    most of the work at this size.
    """
    of_recipe = ("fit", "gain", "alpha")
    own = ImatrixFile(small / "imatrix.gguf")

    def run_build(
        name: str = "out",
        tier: str = "mq2",
        source: Path = small,
        statistics: Statistics | None = own,
        fold_down: float = 0.0,
        **given: Any,
    ) -> BuildResult:
        changes = RecipeChanges(**{"alpha": 0.3} | {key: given.pop(key) for key in of_recipe if key in given})
        options = RunOptions(**{"output": tmp_path / name, "jobs": 2} | given)
        recipe = choose_recipe(tier, None, str(source))
        folded = recipe.model_copy(update={"awq": recipe.awq.model_copy(update={"fold_down": fold_down})})
        return build_file(folded, statistics, options, changes)

    return run_build


@pytest.fixture
def small_hub(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.HubServer]:
    """A hub on loopback that serves the smallest checkpoint; no cache and no token of this machine's is used."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with hub_server.serve({REPO: {MAIN: hub_server.repository(small)}}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server
