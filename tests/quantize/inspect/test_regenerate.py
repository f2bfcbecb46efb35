"""regenerate: layers made alone are those of the whole file, every difference is found, and the source is read once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub_server
import numpy as np
import pytest
import small_model
from hub_server import MAIN, REPO, HubServer
from huggingface_hub import constants
from mq_quant.formats.errors import ImatrixError, InputError, OutputError, RecipeError
from mq_quant.formats.hfq import open_hfq
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.cli.app import main
from mq_quant.quantize.inspect.regenerate import Wanted, regenerate, regenerated_from, write_table
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.statistics import ImatrixFile, NoStatistics, OnTheFly
from mq_quant.quantize.spec.layer_hashes import file_hashes, read_table
from mq_quant.quantize.spec.places import choose_recipe
from small_imatrix import save_imatrix
from watching import Heard

_MODELS = os.environ.get("MQ_QUANT_MODELS")
TABLES = Path(__file__).parents[2] / "layer_hashes"
TWO = ("mq2", "mq4")


@pytest.fixture
def wanted(small: Path) -> Wanted:
    return Wanted((1,), TWO, str(small), imatrix=small / "imatrix.gguf", jobs=2)


@pytest.fixture
def built(small: Path, tmp_path: Path) -> list[Path]:
    """The files of two tiers, built as the recipes say."""
    paths = [tmp_path / f"small.{tier}" for tier in TWO]
    for path, tier in zip(paths, TWO, strict=True):
        recipe = choose_recipe(tier, None, str(small))
        build_file(recipe, ImatrixFile(small / "imatrix.gguf"), RunOptions(path, 2))
    return paths


def test_layers_that_are_not_there_are_refused(wanted: Wanted) -> None:
    with pytest.raises(RecipeError, match="no layer 2: the model has 2"):
        regenerate(replace(wanted, layers=(0, 2)))
    with pytest.raises(RecipeError, match="no tier 'mq5'"):
        regenerate(replace(wanted, tiers=("mq5",)))
    with pytest.raises(ImatrixError, match="no imatrix was given"):
        regenerate(replace(wanted, imatrix=None))
    with pytest.raises(RecipeError, match="no files were given"):
        regenerated_from([], None)


def test_files_whose_layers_depend_on_others_are_refused(small: Path, tmp_path: Path) -> None:
    recipe = choose_recipe("mq2", None, str(small))
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 300, (2, 16)))
    ways: tuple[Any, ...] = (NoStatistics(), OnTheFly(TokenRequest(None, ids)))
    for number, statistics in enumerate(ways):
        path = tmp_path / f"out{number}"
        build_file(recipe, statistics, RunOptions(path, 2))
        with pytest.raises(InputError, match="cannot be made again one by one"):
            regenerated_from([path], None)


def test_a_layer_made_alone_is_that_of_the_whole_file(
    wanted: Wanted, built: list[Path], tmp_path: Path
) -> None:
    heard = Heard()
    result = regenerate(replace(wanted, layers=None), heard)
    for path in built:
        with open_hfq(path) as file:
            stated = file_hashes(file)
        assert {row.layer: row.hash for row in result.rows if row.tier == path.name.split(".")[1]} == stated
    assert result.same and result.unknown == 4
    total, _, counted = heard.phase("encoding")
    assert total == counted > 0
    table = tmp_path / "layers.json"
    assert write_table(regenerated_from(built, table), table).written == table
    assert read_table(table).imatrix_sha256 is not None
    again = regenerate(replace(wanted, table=table))
    assert again.same and again.unknown == 0
    assert [(row.tier, row.layer) for row in again.rows] == [("mq2", 1), ("mq4", 1)]


def test_a_difference_is_found_and_named(
    wanted: Wanted, built: list[Path], tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "layers.json"
    write_table(regenerated_from(built, table), table)
    document = json.loads(table.read_text())
    document["tiers"]["mq4"]["1"] = "0" * 16
    table.write_text(json.dumps(document))
    line = ["regenerate", "--source", small, "--imatrix", small / "imatrix.gguf", "--hashes", table]
    for extra, code in ((["--layers", "1"], 1), (["--layers", "0"], 0)):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, line), "--tier", "mq4", "--json", *extra])
        said = json.loads(capsys.readouterr().out)
        assert (ended.value.code, said["same"]) == (code, code == 0)
    with pytest.raises(SystemExit):
        main([*map(str, line), "--tier", "mq4", "--layers", "1"])
    assert "DIFFERS from 0000000000000000" in capsys.readouterr().out


def test_hashes_of_other_inputs_are_not_compared(wanted: Wanted, built: list[Path], tmp_path: Path) -> None:
    table = tmp_path / "layers.json"
    write_table(regenerated_from(built, table), table)
    save_imatrix(tmp_path / "other.gguf", seed=1)
    with pytest.raises(InputError, match="of another imatrix_sha256"):
        regenerate(replace(wanted, table=table, imatrix=tmp_path / "other.gguf"))
    with pytest.raises(OutputError, match="folder does not exist"):
        write_table(regenerated_from(built, table), tmp_path / "none" / "layers.json")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--write"], "--write needs --hashes"),
        (["--layers", "0,x"], "numbers with commas"),
        (["--layers", ""], "--layers is empty"),
        (["--from", "x", "--layers", "0"], "--from takes the layers"),
        (["--from", "none.mq2"], "none.mq2: cannot be opened"),
    ],
)
def test_bad_lines_are_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["regenerate", *arguments])
    assert ended.value.code == 2 and says in capsys.readouterr().err


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    folder = small_model.save(tmp_path / "sharded", small_model.tensors(), shards=4)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with hub_server.serve({REPO: {MAIN: hub_server.repository(folder)}}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def test_all_tiers_are_made_of_one_reading_of_the_hub(hub: HubServer, wanted: Wanted, tmp_path: Path) -> None:
    asked = replace(wanted, source=REPO, revision=MAIN, shard_cache=4)
    one = regenerate(replace(asked, tiers=("mq2",)))
    fetched = len([r for r in hub.requests if r.path.startswith("/storage/")])
    hub.requests.clear()
    all_tiers = regenerate(replace(asked, tiers=()))
    assert len([r for r in hub.requests if r.path.startswith("/storage/")]) == fetched
    assert {row.tier for row in all_tiers.rows} == {"mq2", "mq2-lloyd", "mq2-mini", "mq3", "mq3-lloyd", "mq4"}
    assert [row.hash for row in all_tiers.rows if row.tier == "mq2"] == [row.hash for row in one.rows]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".mq-quant")]


@pytest.mark.skipif(not _MODELS, reason="MQ_QUANT_MODELS is not set")
@pytest.mark.parametrize(("name", "layer"), [("trained-tiny", 2), ("trained-wide", 1)])
def test_a_layer_of_a_trained_model_has_its_committed_hash(name: str, layer: int) -> None:
    folder = Path(str(_MODELS)) / name
    wanted = Wanted((layer,), ("mq2-lloyd",), str(folder), table=TABLES / f"{name}.json", jobs=2)
    result = regenerate(replace(wanted, imatrix=folder / "imatrix.gguf"))
    assert result.same and result.unknown == 0
    assert len(read_table(TABLES / f"{name}.json").tiers) == 6
