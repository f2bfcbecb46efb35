"""A tuned file: the same tensors in a new file, the same bytes when it is done again, and nothing left beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_model
from damaged import flip_bit
from mq_quant.formats.errors import HfqError, OutputError, ResumeError, TuningError
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.hfq.provenance import Provenance
from mq_quant.formats.minimax import expert_of
from mq_quant.quantize.pipeline.build import BuildResult
from mq_quant.quantize.spec.places import open_place
from mq_quant.quantize.tune.file import TuneOptions, TuneResult, tune_file
from mq_quant.quantize.tune.layer import LayerTuning, TuneSettings
from mq_quant.verify.stages.structure import check_structure

Tune = Callable[..., TuneResult]
SHORT = TuneSettings(epochs=2, batch=256, step=1e-3, matrix_step=5e-4)


@pytest.fixture
def made(run: Callable[..., BuildResult], tmp_path: Path) -> Path:
    run("out.mq2")
    return tmp_path / "out.mq2"


@pytest.fixture
def tune(small: Path, made: Path, tmp_path: Path) -> Tune:
    """Tune the small file: tune("new.mq2", sequences=8, on_layer=hook, …)."""

    def tune_small(
        name: str = "new.mq2", source: Path = small, file: Path = made, sequences: int = 8, **given: Any
    ) -> TuneResult:
        tokens = np.random.default_rng(0).integers(0, 300, (sequences, 48)).astype(np.int32)
        options = TuneOptions(**{"output": tmp_path / name, "settings": SHORT, "jobs": 2} | given)
        return tune_file(file, open_place(str(source), None, 2, None), tokens, options)

    return tune_small


class StopError(Exception):
    """Raised where a test interrupts a run."""


def stop_after(layer: int) -> Callable[[LayerTuning], None]:
    def hook(tuning: LayerTuning) -> None:
        if tuning.layer == layer:
            raise StopError

    return hook


def test_a_new_file_of_the_same_tensors(tune: Tune, made: Path) -> None:
    before = made.read_bytes()
    result = tune()
    assert made.read_bytes() == before
    assert result.kept_layers == 2 and result.resumed_layers == 0 and result.tokens == 8 * 48
    with open_hfq(made) as old, open_hfq(result.path) as new:
        assert result.total_bytes == result.path.stat().st_size
        rows = [[(e.name, e.quant_type, e.shape, e.nbytes) for e in file.entries] for file in (old, new)]
        assert rows[0] == rows[1]
        moved = [e.name for e in old.entries if not np.array_equal(old.read(e.name), new.read(e.name))]
        assert {name for name in moved if not name.startswith("model.layers.")} == set()
        assert sum(1 for name in moved if expert_of(name)) == 2 * 3 * 3
        problems = [check_structure(file).complaints for file in (old, new)]
        assert problems[0] == problems[1]  # the small checkpoint's tokenizer is none
        assert check_structure(new).figures.quantization_hash == result.quantization_hash  # type: ignore[attr-defined]


def test_the_file_says_how_it_was_tuned(tune: Tune, made: Path) -> None:
    result = tune()
    with open_hfq(made) as old, open_hfq(result.path) as new:
        before, after = Provenance.of(old), Provenance.of(new)
        assert (after.recipe, after.source, after.imatrix) == (before.recipe, before.source, before.imatrix)
        tuning = after.document["tuning"]
        assert tuning["tokens"]["sequences"] == 8 and tuning["tokens"]["length"] == 48
        assert tuning["settings"]["epochs"] == 2 and tuning["settings"]["seed"] == SHORT.seed
        assert tuning["device"] == "cpu" and tuning["torch"]
        assert tuning["of"] == old.metadata["quantization_hash"]["value"]
        assert [{**layer["tuning"], "layer": layer["layer"]} for layer in after.layers] == list(result.layers)
        assert all(
            {key: value for key, value in layer.items() if key != "tuning"} == dict(told)
            for layer, told in zip(after.layers, before.layers, strict=True)
        )
        assert all(layer["after"] < layer["before"] for layer in result.layers)


def test_the_same_work_gives_the_same_bytes(tune: Tune) -> None:
    assert tune("a").path.read_bytes() == tune("b").path.read_bytes()


@pytest.mark.parametrize("layer", [0, 1])
def test_an_interrupted_run_ends_in_the_same_bytes(tune: Tune, tmp_path: Path, layer: int) -> None:
    whole = tune("whole").path.read_bytes()
    with pytest.raises(StopError):
        tune("cut", on_layer=stop_after(layer))
    assert not (tmp_path / "cut").exists()
    result = tune("cut")
    assert result.resumed_layers == layer + 1
    assert result.path.read_bytes() == whole


def test_nothing_is_left_beside_the_output(tune: Tune, tmp_path: Path) -> None:
    there = {path.name for path in tmp_path.iterdir()}
    tune("new")
    assert {path.name for path in tmp_path.iterdir()} == {*there, "new"}


def test_a_damaged_stream_is_refused_and_a_restart_begins_anew(tune: Tune, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        tune("cut", on_layer=stop_after(0))
    stream = tmp_path / "cut.partial.tuning" / "own-00001.f32"
    stream.write_bytes(b"\0" * stream.stat().st_size)
    with pytest.raises(ResumeError, match=r"own-00001\.f32: is not as the earlier run left it"):
        tune("cut")
    assert tune("cut", restart=True).path.read_bytes() == tune("whole").path.read_bytes()


def test_other_settings_do_not_continue(tune: Tune) -> None:
    with pytest.raises(StopError):
        tune("cut", on_layer=stop_after(0))
    with pytest.raises(ResumeError, match=r"settings\.epochs is 2 there and 3 here"):
        tune("cut", settings=replace(SHORT, epochs=3))


def test_one_sequence_changes_nothing(tune: Tune, made: Path) -> None:
    result = tune(sequences=1)
    assert result.kept_layers == 0
    with open_hfq(made) as old:
        assert result.quantization_hash == old.metadata["quantization_hash"]["value"]
    assert result.layers[1]["note"] == "layer 1 was not tuned: 1 sequences leave none to judge by"


def test_a_tuned_file_can_be_tuned_again(tune: Tune) -> None:
    first = tune("first")
    second = tune("second", file=first.path)
    with open_hfq(second.path) as file:
        assert Provenance.of(file).document["tuning"]["of"] == first.quantization_hash


def test_the_file_itself_is_never_the_output(tune: Tune, made: Path) -> None:
    for force in (False, True):
        with pytest.raises(OutputError):
            tune(made.name, force=force)


def test_another_source_is_refused_before_any_work(tune: Tune, tmp_path: Path) -> None:
    other = small_model.save(tmp_path / "other", small_model.tensors(seed=1))
    with pytest.raises(TuningError, match="was made from another source"):
        tune(source=other)
    config = {**small_model.CONFIG, "num_local_experts": 4}
    wider = small_model.save(tmp_path / "wider", small_model.tensors(config=config), config=config)
    with pytest.raises(TuningError, match="is of another model than the source"):
        tune(source=wider)
    assert not any(path.name.startswith("new") for path in tmp_path.iterdir())


def test_an_output_that_exists_is_kept(tune: Tune, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        tune("new")
    assert (tmp_path / "new").read_text() == "mine"
    assert tune("new", force=True).kept_layers == 2


def test_a_damaged_file_is_refused_before_any_layer(tune: Tune, made: Path, tmp_path: Path) -> None:
    flip_bit(made, small_model.W1, 7)
    with pytest.raises(HfqError, match=f"{small_model.W1}: its bytes are not those that were written"):
        tune(on_layer=stop_after(0))
    assert [path.name for path in tmp_path.glob("*new*")] == []
