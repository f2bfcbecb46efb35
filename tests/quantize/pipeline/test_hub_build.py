"""Builds from a hub on loopback: the same payloads as from the folder, resumed across runs, pinned to one revision."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub_server
import numpy as np
import pytest
import small_model
from hub_server import MAIN, REPO
from huggingface_hub import constants
from mq_quant.formats.errors import CalibrationError, RecipeError, ResumeError
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.inspect.reproduce import Inputs, reproduce
from mq_quant.quantize.inspect.show import provenance
from mq_quant.quantize.pipeline.build import BuildResult, RunOptions, build_file
from mq_quant.quantize.pipeline.build_spec import NOT_SENSITIVE, RecipeChanges
from mq_quant.quantize.pipeline.statistics import NoStatistics, OnTheFly
from mq_quant.quantize.pipeline.work_units import WorkUnit
from mq_quant.quantize.spec.places import choose_recipe, model_files
from mq_quant.quantize.spec.recipe import Recipe, load_tier
from mq_quant.quantize.write.partial_file import JOURNAL

Run = Callable[..., BuildResult]


@pytest.fixture
def repository(small: Path) -> dict[str, bytes]:
    return {**hub_server.repository(small), "imatrix.gguf": (small / "imatrix.gguf").read_bytes()}


@pytest.fixture
def hub(
    repository: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[hub_server.HubServer]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with hub_server.serve({REPO: {MAIN: repository}}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def recipe() -> Recipe:
    """mq2 of a model that lies, with its imatrix, in the loopback repository."""
    base = load_tier("mq2", "tiny")
    document = {
        "name": "streamed",
        "source": {"repository": REPO},
        "imatrix": {"repository": REPO, "file": "imatrix.gguf"},
    }
    model = type(base.model).model_validate(document)
    return base.model_copy(update={"model": model, "quantization_hash": None})


def stream(folder: Path, statistics: OnTheFly | None = None, **given: Any) -> BuildResult:
    return build_file(recipe(), statistics, RunOptions(folder / "out", 2, **given), RecipeChanges(alpha=0.3))


def test_streamed_payloads_are_those_of_the_folder(
    hub: hub_server.HubServer, run: Run, tmp_path: Path
) -> None:
    local = run("local")
    streamed = stream(tmp_path)
    assert streamed.quantization_hash == local.quantization_hash
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "local", "out"]
    record = provenance(tmp_path / "out").document
    assert record["source"]["origin"] == {"repository": REPO, "revision": MAIN}
    assert record["source"]["files"] == provenance(tmp_path / "local").document["source"]["files"]
    assert record["recipe"]["model"]["source"]["revision"] == MAIN
    assert record["recipe"]["model"]["imatrix"]["revision"] == MAIN


def test_every_small_file_is_fetched_once(hub: hub_server.HubServer, tmp_path: Path) -> None:
    model_files(recipe().model)
    stream(tmp_path)
    asked = [r.path.rpartition("/")[2] for r in hub.requests if "/resolve/" in r.path]
    small = {name for name in asked if not name.endswith(".safetensors")}
    assert {"config.json", "tokenizer.json"} < small
    assert all(asked.count(name) == 1 for name in small)


@pytest.mark.parametrize("shards", [1, 4])
def test_a_streamed_build_can_calibrate_itself(
    shards: int, hub: hub_server.HubServer, run: Run, small: Path, tmp_path: Path
) -> None:
    """A layer is read twice, by the model and by the encoder, however few of its shards fit on the disk. The imatrix
    behind few tokens is the recipe's own, unless one is given."""
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 300, (2, 16)))
    own = OnTheFly(TokenRequest(tokens=tmp_path / "tokens.npy"))
    local = run("local", statistics=replace(own, imatrix=small / "imatrix.gguf", sensitivity=False))
    notes: list[str] = []
    streamed = stream(tmp_path, own, shard_cache=shards, on_note=notes.append)
    assert NOT_SENSITIVE in notes
    assert "sensitivity" not in provenance(tmp_path / "out").document["calibration"]
    assert provenance(tmp_path / "out").document["recipe"]["model"]["imatrix"]["revision"] == MAIN
    assert streamed.quantization_hash == local.quantization_hash
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "local", "out", "tokens.npy"]


def test_a_source_is_not_fetched_three_times_on_request(hub: hub_server.HubServer, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 300, (2, 16)))
    own = OnTheFly(TokenRequest(tokens=tmp_path / "tokens.npy"), sensitivity=True)
    with pytest.raises(CalibrationError, match="a source that lies here") as refused:
        stream(tmp_path, own)
    assert "--source" in str(refused.value.hint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "tokens.npy"]


def test_a_streamed_file_is_reproduced_once_its_repository_is_named(
    hub: hub_server.HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stream(tmp_path)
    asked = len(hub.requests)
    with pytest.raises(
        RecipeError, match=f"made from '{REPO}', a repository that this program does not know"
    ):
        reproduce(tmp_path / "out")
    assert len(hub.requests) == asked
    assert reproduce(tmp_path / "out", Inputs(REPO), jobs=2).identical


def test_a_snapshot_folder_is_known_as_its_repository(small: Path, tmp_path: Path) -> None:
    """The same provenance as of a build from the hub, though nothing is fetched."""
    folder = tmp_path / "models--acme--Small-M2" / "snapshots" / MAIN
    shutil.copytree(small, folder)
    recipe = choose_recipe("mq2", None, str(folder))
    build_file(recipe, NoStatistics(), RunOptions(tmp_path / "out", 2))
    record = provenance(tmp_path / "out").document
    assert record["source"]["origin"] == {"repository": "acme/Small-M2", "revision": MAIN}
    assert record["recipe"]["model"]["name"] == "Small-M2"
    assert record["recipe"]["model"]["source"] == {"repository": "acme/Small-M2", "revision": MAIN}


def test_a_streamed_build_resumes_and_refuses_another_revision(
    hub: hub_server.HubServer, repository: dict[str, bytes], tmp_path: Path
) -> None:
    begun = 0

    def failing(unit: WorkUnit) -> None:
        nonlocal begun
        begun += 1
        if begun > 18:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(tmp_path, on_begin=failing)
    assert (tmp_path / f"out{JOURNAL}").exists()
    moved = "b" * 40
    config = json.dumps({**small_model.CONFIG, "note": "changed"}).encode()
    hub.repositories[REPO] = {moved: {**repository, "config.json": config}}
    with pytest.raises(ResumeError, match=rf"revision is '{MAIN}' there and '{moved}' here"):
        stream(tmp_path)
    hub.repositories[REPO] = {MAIN: repository}
    assert stream(tmp_path).resumed_units > 0
