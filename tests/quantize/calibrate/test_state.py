"""A calibration state: parts that begin from it have the bytes of one machine, and run no layer before their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_model
from build_hooks import StopError
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.errors import CalibrationError, OutputError
from mq_quant.quantize.calibrate import on_the_fly
from mq_quant.quantize.calibrate.folder import STATE, hidden_file
from mq_quant.quantize.calibrate.sensitivity import sensitivity_file
from mq_quant.quantize.calibrate.state import CalibrationState, StateOptions, equal_parts, make_state
from mq_quant.quantize.calibrate.tokens import TokenRequest, load_tokens
from mq_quant.quantize.cli.app import main
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.build_spec import RecipeChanges
from mq_quant.quantize.pipeline.merge import merge_parts
from mq_quant.quantize.pipeline.parts import LayerRange
from mq_quant.quantize.pipeline.statistics import OnTheFly
from mq_quant.quantize.spec.places import choose_recipe
from watching import Heard

LAYERS = 4
CONFIG = {**small_model.CONFIG, "num_hidden_layers": LAYERS}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = small_model.tensors(config=CONFIG)
    folder = small_model.save(tmp_path_factory.mktemp("models") / "small", content, config=CONFIG)
    np.save(folder / "tokens.npy", np.random.default_rng(3).integers(0, 300, (4, 16)).astype(np.int32))
    return folder


def tokens_of(source: Path) -> TokenRequest:
    return TokenRequest(tokens=source / "tokens.npy")


def made(source: Path, path: Path, streams: int = 2, **options: Any) -> Path:
    checkpoint = open_checkpoint(source)
    layers = equal_parts(LAYERS, streams)
    tokens = load_tokens(checkpoint, tokens_of(source))
    return make_state(checkpoint, tokens, path, StateOptions(layers, **options)).path


@pytest.fixture(scope="module")
def state(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(source, tmp_path_factory.mktemp("states") / "state")


def built(
    source: Path, out: Path, part: LayerRange | None = None, state: Path | None = None, **options: Any
) -> Path:
    statistics = OnTheFly(tokens_of(source), state=state)
    recipe = choose_recipe("mq2", None, str(source))
    return build_file(recipe, statistics, RunOptions(out, **options), RecipeChanges(alpha=0.3), part).path


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return built(source, tmp_path_factory.mktemp("whole") / "out").read_bytes()


@pytest.fixture
def run_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that builds run the model through, in order."""
    layers: list[int] = []
    gather = on_the_fly.gather_layer

    def counted(weights: Any, config: Any, layer: int, *given: Any, **more: Any) -> Any:
        layers.append(layer)
        return gather(weights, config, layer, *given, **more)

    monkeypatch.setattr(on_the_fly, "gather_layer", counted)
    return layers


def test_parts_from_a_state_are_those_of_one_machine(
    source: Path, state: Path, whole: bytes, tmp_path: Path, run_layers: list[int]
) -> None:
    parts = [built(source, tmp_path / f"part {n}", LayerRange(n, n + 1, LAYERS), state) for n in (0, 2)]
    assert run_layers == [0, 1, 2, 3]
    assert merge_parts(parts, tmp_path / "merged").path.read_bytes() == whole


def test_a_part_between_streams_begins_at_the_one_before(
    source: Path, state: Path, tmp_path: Path, run_layers: list[int]
) -> None:
    last = LayerRange(3, 3, LAYERS)
    from_state = built(source, tmp_path / "from state", last, state)
    assert run_layers == [2, 3]
    assert from_state.read_bytes() == built(source, tmp_path / "alone", last).read_bytes()


def test_a_part_that_was_stopped_continues_with_and_without_the_state(
    source: Path, state: Path, tmp_path: Path
) -> None:
    layers, expected = (
        LayerRange(2, 3, LAYERS),
        built(source, tmp_path / "expected", LayerRange(2, 3, LAYERS), state),
    )
    for n, (first, then) in enumerate(((state, None), (None, state), (state, state))):
        count = 0

        def stop(unit: Any) -> None:
            nonlocal count
            count += 1
            if count == 3 or unit.key == "layer 3 expert 1":
                raise StopError

        for _ in range(2):
            with pytest.raises(StopError):
                built(source, tmp_path / str(n), layers, first, on_done=stop)
        assert built(source, tmp_path / str(n), layers, then).read_bytes() == expected.read_bytes()


def test_a_state_that_was_stopped_continues_to_the_same_bytes(
    source: Path, state: Path, tmp_path: Path
) -> None:
    class Stops(Heard):
        def advance(self, amount: int, doing: str = "") -> None:
            if doing == "layer 2":
                raise StopError

    with pytest.raises(StopError):
        made(source, tmp_path / "state", watch=Stops())
    assert (
        CalibrationState.open(made(source, tmp_path / "state")).records
        == CalibrationState.open(state).records
    )
    assert (tmp_path / "state" / hidden_file(2)).read_bytes() == (state / hidden_file(2)).read_bytes()


def test_a_state_holds_no_more_than_its_streams(state: Path) -> None:
    found = sorted(path.name for path in state.iterdir())
    assert found == [hidden_file(2), *(sensitivity_file(layer) for layer in range(LAYERS)), STATE]


def test_a_finished_state_is_replaced_on_request_alone(source: Path, state: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(state, tmp_path / "state")
    with pytest.raises(OutputError, match="holds a finished calibration"):
        made(source, copy)
    made(source, copy, streams=4, force=True)
    assert CalibrationState.open(copy).streams == (1, 2, 3)


def test_a_state_of_another_text_is_refused_by_name(source: Path, state: Path, tmp_path: Path) -> None:
    recipe = choose_recipe("mq2", None, str(source))
    statistics = OnTheFly(TokenRequest(tokens=source / "tokens.npy", sequences=2), state=state)
    with pytest.raises(
        CalibrationError,
        match=r"is of another calibration:\n    sensitivity\.tokens is 64 there and 32 here\n    tokens",
    ):
        build_file(recipe, statistics, RunOptions(tmp_path / "out"), part=LayerRange(2, 3, LAYERS))
    assert not list(tmp_path.iterdir())


def test_a_damaged_stream_is_refused(source: Path, state: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(state, tmp_path / "state")
    stream = copy / hidden_file(2)
    data = bytearray(stream.read_bytes())
    data[5] ^= 1
    for content in (bytes(data), bytes(data[:-1]), None):
        stream.unlink()
        if content is not None:
            stream.write_bytes(content)
        with pytest.raises(CalibrationError, match="is not the stream that was written there"):
            built(source, tmp_path / "out", LayerRange(2, 3, LAYERS), copy)
        if content is None:
            stream.write_bytes(b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"layers": [], "streams": []}', '{"layers": [{}], "streams": [1]}']
)
def test_what_is_no_state_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds no finished calibration state"):
        CalibrationState.open(tmp_path)
    (tmp_path / STATE).write_text(text)
    with pytest.raises(CalibrationError, match=r"state\.json: cannot be read"):
        CalibrationState.open(tmp_path)


def test_the_commands(source: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--source", str(source), "--tokens", str(source / "tokens.npy")]

    def run(*line: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main([*line])
        return int(ended.value.code or 0)

    assert run("calibrate", *given, "--streams", "2", "-o", "state", "--json") == 0
    assert json.loads((tmp_path / "state" / STATE).read_text())["streams"] == [2]
    build = ["build", "--tier", "mq2", *given, "--awq-alpha", "0.3", "--calibration-state", "state", "-q"]
    assert run(*build) == 2
    for n in (1, 2):
        assert run(*build, "--part", f"{n}/2", "-o", f"part-{n}") == 0
    assert run("merge", "part-1", "part-2", "-o", "whole") == 0
    assert (tmp_path / "whole").read_bytes() == whole
