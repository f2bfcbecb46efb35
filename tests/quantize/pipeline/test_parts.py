"""Parts of a build: together they are the file of one machine, and what is no part of it is refused by name."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import small_model
from build_hooks import StopError
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.errors import MqError, OutputError, PartError, RecipeError
from mq_quant.formats.watch import Unit
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.build_spec import RecipeChanges
from mq_quant.quantize.pipeline.merge import merge_parts
from mq_quant.quantize.pipeline.parts import HEAD, LayerRange
from mq_quant.quantize.pipeline.statistics import NoStatistics, OnTheFly, Statistics
from mq_quant.quantize.spec.places import choose_recipe
from mq_quant.quantize.tune.layer import TuneSettings

LAYERS = 3
CONFIG = {**small_model.CONFIG, "num_hidden_layers": LAYERS}
PLAIN = NoStatistics()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = small_model.tensors(config=CONFIG)
    folder = small_model.save(tmp_path_factory.mktemp("models") / "small", content, config=CONFIG)
    np.save(folder / "tokens.npy", np.random.default_rng(3).integers(0, 300, (4, 16)).astype(np.int32))
    return folder


def built(
    source: Path,
    out: Path,
    part: LayerRange | None = None,
    statistics: Statistics = PLAIN,
    tier: str = "mq2",
) -> Path:
    changes = RecipeChanges() if statistics is PLAIN else RecipeChanges(alpha=0.3)
    recipe = choose_recipe(tier, None, str(source))
    return build_file(recipe, statistics, RunOptions(out, jobs=2), changes, part).path


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return built(source, tmp_path_factory.mktemp("whole") / "out").read_bytes()


@pytest.fixture(scope="module")
def parts(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("parts")
    ranges = (LayerRange(0, 0, LAYERS), LayerRange(1, 2, LAYERS))
    return [built(source, folder / f"layers-{each}", each) for each in ranges]


# --- which layers -----------------------------------------------------------------------------------------------------


@given(layers=st.integers(1, 100), count=st.integers(1, 100))
def test_equal_parts_hold_each_layer_once(layers: int, count: int) -> None:
    if count > layers:
        with pytest.raises(RecipeError, match="is no part of this model"):
            LayerRange.parse(None, f"{count}/{count}", layers)
        return
    ranges = [LayerRange.parse(None, f"{i + 1}/{count}", layers) for i in range(count)]
    held = [n for each in ranges for n in range(each.first, each.last + 1)]
    assert held == list(range(layers))
    sizes = [each.last - each.first + 1 for each in ranges]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("text", ["", "3", "2-1", "0-3", "-1", "1-", "a", "1-2-3", "1,2", "٣", "9999999"])
def test_layers_that_the_model_lacks_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="names no layers of this model, which has 0 to 2"):
        LayerRange.parse(text, None, LAYERS)


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "4/4", "1/2/3", "-1/2", "a/b"])
def test_parts_that_there_are_not_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is no part of this model"):
        LayerRange.parse(None, text, LAYERS)


# --- together ---------------------------------------------------------------------------------------------------------


def test_merged_parts_are_the_file_of_one_machine(parts: list[Path], whole: bytes, tmp_path: Path) -> None:
    result = merge_parts(parts[::-1], tmp_path / "out")
    assert result.path.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (result.parts, result.resumed_units, result.total_bytes) == (2, 0, len(whole))


def test_a_part_takes_no_more_than_its_layers(parts: list[Path], whole: bytes) -> None:
    assert sum(path.stat().st_size for path in parts) < 1.01 * len(whole) + 2 * 20_000


def test_parts_of_a_calibrated_build_run_the_model_on_their_own(source: Path, tmp_path: Path) -> None:
    statistics = OnTheFly(TokenRequest(tokens=source / "tokens.npy"))
    one = built(source, tmp_path / "one", statistics=statistics).read_bytes()
    made = [
        built(source, tmp_path / f"part {n}", LayerRange(n, n, LAYERS), statistics) for n in range(LAYERS)
    ]
    assert merge_parts(made, tmp_path / "merged").path.read_bytes() == one


def test_a_merge_that_is_stopped_continues(parts: list[Path], whole: bytes, tmp_path: Path) -> None:
    class Stops:
        count = 0

        def begin(self, phase: str, total: int, unit: Unit, done: int = 0) -> None:
            pass

        def advance(self, amount: int, doing: str = "") -> None:
            self.count += 1
            if self.count == 7:
                raise StopError

    with pytest.raises(StopError):
        merge_parts(parts, tmp_path / "out", watch=Stops())
    assert not (tmp_path / "out").exists()
    result = merge_parts(parts, tmp_path / "out")
    assert result.resumed_units == 7
    assert result.path.read_bytes() == whole


def test_a_part_is_resumed_like_a_file(source: Path, parts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "part"
    count = 0

    def stop(_: object) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise StopError

    recipe, layers = choose_recipe("mq2", None, str(source)), LayerRange(1, 2, LAYERS)
    with pytest.raises(StopError):
        build_file(recipe, PLAIN, RunOptions(out, on_done=stop), part=layers)
    result = build_file(recipe, PLAIN, RunOptions(out), part=layers)
    assert result.resumed_units == 4
    assert out.read_bytes() == parts[1].read_bytes()


def test_an_unfinished_part_is_no_other_part(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "part"

    def stop(_: object) -> None:
        raise StopError

    recipe = choose_recipe("mq2", None, str(source))
    with pytest.raises(StopError):
        build_file(recipe, PLAIN, RunOptions(out, on_done=stop), part=LayerRange(0, 0, LAYERS))
    with pytest.raises(MqError, match="layers is '0-0' there and '1-1' here"):
        build_file(recipe, PLAIN, RunOptions(out), part=LayerRange(1, 1, LAYERS))


# --- what cannot be merged --------------------------------------------------------------------------------------------


def test_tuned_builds_have_no_parts(source: Path, tmp_path: Path) -> None:
    statistics = OnTheFly(TokenRequest(tokens=source / "tokens.npy"), tuning=TuneSettings())
    with pytest.raises(RecipeError, match="a tuned layer follows from all layers before it"):
        built(source, tmp_path / "part", LayerRange(0, 0, LAYERS), statistics)
    assert not list(tmp_path.iterdir())


def test_missing_layers_are_named(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(PartError, match=r"layers 1 to 2 are in none of the parts.*\n.*--layers 1-2"):
        merge_parts(parts[:1], tmp_path / "out")
    with pytest.raises(PartError, match="layer 0 is in none of the parts"):
        merge_parts(parts[1:], tmp_path / "out")
    with pytest.raises(PartError, match="no part was given"):
        merge_parts([], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_layers_that_come_twice_are_named(source: Path, parts: list[Path], tmp_path: Path) -> None:
    more = built(source, tmp_path / "more", LayerRange(0, 1, LAYERS))
    with pytest.raises(PartError, match="has layer 1, which more has too"):
        merge_parts([more, parts[1]], tmp_path / "out")


def test_parts_of_other_builds_are_refused_with_what_differs(
    source: Path, parts: list[Path], tmp_path: Path
) -> None:
    other = built(source, tmp_path / "other", LayerRange(1, 2, LAYERS), tier="mq3")
    with pytest.raises(
        PartError, match=r"is of another build than layers-0-0:\n    recipe.tier is 'mq3' there"
    ):
        merge_parts([parts[0], other], tmp_path / "out")


def test_the_place_of_the_source_may_differ(
    source: Path, parts: list[Path], whole: bytes, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere" / source.name
    elsewhere.mkdir(parents=True)
    for path in source.iterdir():
        (elsewhere / path.name).write_bytes(path.read_bytes())
    other = built(elsewhere, tmp_path / "part", LayerRange(1, 2, LAYERS))
    assert merge_parts([parts[0], other], tmp_path / "out").path.read_bytes() == whole


def test_a_part_that_is_cut_short_is_refused(parts: list[Path], tmp_path: Path) -> None:
    data, cut = parts[1].read_bytes(), tmp_path / "cut"
    for size in (0, 1, HEAD.size - 1, HEAD.size, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:size])
        with pytest.raises(PartError, match=r"is no part of a build|has \d+ bytes, and should have"):
            merge_parts([parts[0], cut], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_changed_byte_of_a_part_passes(parts: list[Path], tmp_path: Path) -> None:
    data, changed, chance = parts[1].read_bytes(), tmp_path / "changed", random.Random(5)
    record = int.from_bytes(data[8:16], "little")
    places = [0, 9, 17, 25, HEAD.size, record - 1, record, len(data) - 1]
    for place in [*places, *(chance.randrange(len(data)) for _ in range(12))]:
        broken = bytearray(data)
        broken[place] ^= 1 << chance.randrange(8)
        changed.write_bytes(broken)
        with pytest.raises(PartError):
            merge_parts([parts[0], changed], tmp_path / "out", restart=True)
    assert not (tmp_path / "out").exists()


def test_a_part_that_cannot_be_opened_is_named(parts: list[Path], tmp_path: Path) -> None:
    for place in (tmp_path / "nothing", tmp_path):
        with pytest.raises(PartError, match=f"{place.name}: cannot be read"):
            merge_parts([parts[0], place], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_output_is_no_part(parts: list[Path], tmp_path: Path) -> None:
    copies = [tmp_path / path.name for path in parts]
    for copy, path in zip(copies, parts, strict=True):
        copy.write_bytes(path.read_bytes())
    with pytest.raises(OutputError):
        merge_parts(copies, copies[0], force=True)
    with pytest.raises(OutputError, match="exists already"):
        merge_parts(copies, copies[0])
    assert copies[0].read_bytes() == parts[0].read_bytes()
