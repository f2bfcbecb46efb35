"""Builds that tune each layer: the codes of a calibrated build, one file whatever interrupts them, and losses told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_model
from build_hooks import StopError, stopped
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.hfq.stored import format_of
from mq_quant.formats.minimax import expert_of
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.inspect.reproduce import Inputs, reproduce
from mq_quant.quantize.inspect.show import provenance
from mq_quant.quantize.pipeline.build import BuildResult, RunOptions, build_file
from mq_quant.quantize.pipeline.build_spec import RecipeChanges
from mq_quant.quantize.pipeline.statistics import OnTheFly
from mq_quant.quantize.pipeline.work_units import WorkUnit, whole_layers
from mq_quant.quantize.spec.places import choose_recipe
from mq_quant.quantize.tune.layer import TuneSettings
from mq_quant.quantize.tune.student import head_bytes
from mq_quant.quantize.write.partial_file import CALIBRATION, PARTIAL, TUNING

LAYERS = 2
CONFIG = {**small_model.CONFIG, "num_hidden_layers": LAYERS}
TOKENS = np.random.default_rng(3).integers(0, 300, (6, 16)).astype(np.int32)
FAST = TuneSettings(epochs=2, batch=32, held=0.34)

Run = Callable[..., BuildResult]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = small_model.tensors(config=CONFIG)
    folder = small_model.save(tmp_path_factory.mktemp("models") / "small", content, config=CONFIG)
    np.save(folder / "tokens.npy", TOKENS)
    return folder


def built(source: Path, out: Path, tuning: TuneSettings | None = FAST, **given: Any) -> BuildResult:
    statistics = OnTheFly(TokenRequest(tokens=source / "tokens.npy"), tuning=tuning)
    options = RunOptions(**{"output": out, "jobs": 2} | given)
    return build_file(choose_recipe("mq2", None, str(source)), statistics, options, RecipeChanges(alpha=0.3))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a build in one go."""
    out = tmp_path_factory.mktemp("whole") / "out"
    built(source, out, jobs=1)
    return out


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Run:
    return lambda **given: built(source, tmp_path / "out", **given)


def names(where: Path) -> list[str]:
    return sorted(path.name for path in where.iterdir())


def test_the_bytes_do_not_depend_on_the_workers_and_nothing_is_left_behind(
    run: Run, whole: Path, tmp_path: Path
) -> None:
    run(jobs=3)
    assert (tmp_path / "out").read_bytes() == whole.read_bytes() and names(tmp_path) == ["out"]


def test_codes_are_those_of_the_calibrated_build(source: Path, whole: Path, tmp_path: Path) -> None:
    built(source, tmp_path / "plain", tuning=None)
    moved = 0
    with open_hfq(tmp_path / "plain") as plain, open_hfq(whole) as tuned:
        for here in plain.entries:
            a, b = (f.read_range(f.entry(here.name), 0, here.nbytes) for f in (plain, tuned))
            moved += not np.array_equal(a, b)
            if expert_of(here.name):
                fmt: Any = format_of(plain, here)
                heads = head_bytes(fmt)
                assert np.array_equal(fmt.groups(a)[:, heads:], fmt.groups(b)[:, heads:])
    assert moved > 10


def test_the_file_says_how_it_was_tuned_and_what_that_gave(whole: Path) -> None:
    record = provenance(whole).document
    assert record["recipe"]["effort"] == "tuned"
    assert record["tuning"] == {"settings": FAST.record(), "threads": record["tuning"]["threads"]}
    assert len(record["layers"]) == LAYERS
    for layer in record["layers"]:
        said = layer["tuning"]
        assert said["before"] > 0
        assert said["kept"] == (said["after"] < said["before"])
    assert any(layer["tuning"]["kept"] for layer in record["layers"])


@pytest.mark.parametrize(
    "key",
    [
        "layer 0 expert 2",
        "model.layers.1.input_layernorm.weight",
        "layer 1 expert 2",
        "lm_head.weight",
    ],
)
def test_an_interrupted_build_ends_in_the_same_bytes(key: str, run: Run, whole: Path, tmp_path: Path) -> None:
    with stopped(at=key) as hook:
        run(jobs=1, on_begin=hook)
    run()
    assert (tmp_path / "out").read_bytes() == whole.read_bytes() and names(tmp_path) == ["out"]


def test_a_stop_while_a_tuned_layer_is_written_costs_that_layer(
    run: Run, whole: Path, tmp_path: Path
) -> None:
    def stop(unit: WorkUnit) -> None:
        if unit.key == "layer 1 expert 1":
            raise StopError

    with pytest.raises(StopError):
        run(on_done=stop)
    encoded: list[WorkUnit] = []
    run(jobs=1, on_begin=encoded.append)
    assert {unit.layer for unit in encoded} - {None} == {1}
    assert (tmp_path / "out").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("lost", [(TUNING,), (TUNING, CALIBRATION)])
def test_the_files_own_stream_is_made_again_where_it_is_lost(
    lost: tuple[str, ...], run: Run, whole: Path, tmp_path: Path
) -> None:
    with stopped(at="layer 1 expert 1") as hook:
        run(jobs=1, on_begin=hook)
    assert names(tmp_path / f"out{TUNING}") == ["own-00001.f32"]
    for folder in lost:
        for file in (tmp_path / f"out{folder}").iterdir():
            file.unlink()
    run()
    assert (tmp_path / "out").read_bytes() == whole.read_bytes()


def test_a_damaged_unit_has_its_whole_layer_made_again(run: Run, whole: Path, tmp_path: Path) -> None:
    with open_hfq(whole) as file:
        at = file.entry("model.layers.0.block_sparse_moe.experts.2.w1.weight").offset
    with stopped(at="layer 1 expert 1") as hook:
        run(jobs=1, on_begin=hook)
    data = bytearray((tmp_path / f"out{PARTIAL}").read_bytes())
    data[at] ^= 1
    (tmp_path / f"out{PARTIAL}").write_bytes(data)
    run()
    assert (tmp_path / "out").read_bytes() == whole.read_bytes()


def test_what_is_kept_of_an_interrupted_build_is_whole_layers(whole: Path) -> None:
    class Unit:
        def __init__(self, key: str, layer: int | None) -> None:
            self.key, self.layer = key, layer

    order: Any = [Unit("a", None), Unit("b", 0), Unit("c", 0), Unit("d", 1), Unit("e", 1), Unit("f", None)]
    assert whole_layers(order, frozenset("abcd")) == frozenset("abc")
    assert whole_layers(order, frozenset("abdef")) == frozenset("adef")


def test_its_rounded_part_is_reproduced_and_the_tuned_part_is_named(source: Path, whole: Path) -> None:
    again = reproduce(whole, Inputs(str(source), tokens=TokenRequest(tokens=source / "tokens.npy")), 2)
    assert again.identical and 0 < again.tuned_tensors < again.tensor_count
