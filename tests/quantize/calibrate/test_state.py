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
from mq_quant.formats.errors import CalibrationError, MqError, OutputError
from mq_quant.formats.hfq import open_hfq
from mq_quant.quantize.calibrate import error_costs, source_layers
from mq_quant.quantize.calibrate.folder import STATE, hidden_file
from mq_quant.quantize.calibrate.sensitivity_files import sensitivity_file
from mq_quant.quantize.calibrate.state import CalibrationState, StateOptions, equal_parts, make_state
from mq_quant.quantize.calibrate.tokens import TokenRequest, load_tokens
from mq_quant.quantize.cli.app import main
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.build_spec import RecipeChanges
from mq_quant.quantize.pipeline.merge import merge_parts
from mq_quant.quantize.pipeline.parts import LayerRange
from mq_quant.quantize.pipeline.statistics import OnTheFly
from mq_quant.quantize.spec.calibration_sizes import sensitivity_sizes
from mq_quant.quantize.spec.places import choose_recipe
from watching import Heard

LAYERS = 4
CONFIG = {**small_model.CONFIG, "num_hidden_layers": LAYERS}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = small_model.tensors(config=CONFIG) | {"lm_head.weight": small_model.narrow_head()}
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
    source: Path,
    out: Path,
    part: LayerRange | None = None,
    state: Path | None = None,
    sensitivity: bool | None = None,
    **options: Any,
) -> Path:
    statistics = OnTheFly(tokens_of(source), state=state, sensitivity=sensitivity)
    recipe = choose_recipe("mq2", None, str(source))
    return build_file(recipe, statistics, RunOptions(out, **options), RecipeChanges(alpha=0.3), part).path


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return built(source, tmp_path_factory.mktemp("whole") / "out").read_bytes()


@pytest.fixture
def run_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that builds run the model through, in order."""
    layers: list[int] = []
    gather = source_layers.gather_layer

    def counted(weights: Any, config: Any, layer: int, *given: Any, **more: Any) -> Any:
        layers.append(layer)
        return gather(weights, config, layer, *given, **more)

    monkeypatch.setattr(source_layers, "gather_layer", counted)
    return layers


def test_parts_from_a_state_are_those_of_one_machine(
    source: Path, state: Path, whole: bytes, tmp_path: Path, run_layers: list[int]
) -> None:
    parts = [built(source, tmp_path / f"part {n}", LayerRange(n, n + 1, LAYERS), state) for n in (0, 2)]
    assert run_layers == [0, 1, 2, 3]
    assert merge_parts(parts, tmp_path / "merged").path.read_bytes() == whole


def test_sensitivities_of_the_state_decide_what_is_written(
    source: Path, state: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the test before would say nothing of them: the same record without their bytes is another file."""
    monkeypatch.setattr(error_costs, "row_answers", lambda _: None)
    (tmp_path / "ignored").write_bytes(built(source, tmp_path / "out").read_bytes())
    (tmp_path / "whole").write_bytes(whole)
    with open_hfq(tmp_path / "ignored") as a, open_hfq(tmp_path / "whole") as b:
        assert a.metadata["mq_quant"]["calibration"] == b.metadata["mq_quant"]["calibration"]
        for layer in range(1, LAYERS):
            w1, w2 = (f"model.layers.{layer}.block_sparse_moe.experts.0.{p}.weight" for p in ("w1", "w2"))
            same = {
                name: np.array_equal(*(f.read_range(f.entry(name), 0, f.entry(name).nbytes) for f in (a, b)))
                for name in (w1, w2)
            }
            assert same == {w1: True, w2: False}


def test_a_state_without_sensitivities_gives_parts_of_a_build_without(source: Path, tmp_path: Path) -> None:
    """What a state of a hub's source is: it would be fetched twice."""
    state = made(source, tmp_path / "state", sensitivity=False)
    assert sorted(path.name for path in state.iterdir()) == [hidden_file(2), STATE]
    parts = [built(source, tmp_path / f"part {n}", LayerRange(n, n + 1, LAYERS), state) for n in (0, 2)]
    without = built(source, tmp_path / "without", sensitivity=False).read_bytes()
    assert merge_parts(parts, tmp_path / "merged").path.read_bytes() == without


def test_parts_with_and_without_are_not_merged(source: Path, state: Path, tmp_path: Path) -> None:
    parts = [
        built(source, tmp_path / "first", LayerRange(0, 1, LAYERS), state),
        built(source, tmp_path / "last", LayerRange(2, 3, LAYERS), sensitivity=False),
    ]
    with pytest.raises(MqError, match="sensitivity"):
        merge_parts(parts, tmp_path / "merged")


@pytest.mark.parametrize("at", ["layer 1", "layer 2, back", "layer 0, back"])
def test_a_state_that_was_stopped_while_errors_were_found_continues_there(
    at: str, source: Path, state: Path, tmp_path: Path
) -> None:
    def stop(doing: str) -> None:
        if doing == at:
            raise StopError

    with pytest.raises(StopError):
        made(source, tmp_path / "state", watch=Heard(then=stop))
    heard = Heard()
    again = made(source, tmp_path / "state", watch=heard)
    assert [path.read_bytes() for path in sorted(again.iterdir())] == [
        path.read_bytes() for path in sorted(state.iterdir())
    ]
    assert ("layer 3, back" in heard.doing) == (at == "layer 1")


def test_a_damaged_sensitivity_is_refused_before_any_layer_is_run(
    source: Path, state: Path, tmp_path: Path, run_layers: list[int]
) -> None:
    copy = shutil.copytree(state, tmp_path / "state")
    file = copy / sensitivity_file(3)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    for content in (bytes(data), b"", None):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(CalibrationError, match="is not the sensitivity that was written") as refused:
            built(source, tmp_path / "out", LayerRange(2, 3, LAYERS), copy)
        assert refused.value.file == str(file) and "copy the state" in str(refused.value.hint)
        if content is None:
            file.write_bytes(b"")
    assert run_layers == [] and sorted(path.name for path in tmp_path.iterdir()) == ["state"]
    file.unlink()
    built(source, tmp_path / "out", LayerRange(0, 1, LAYERS), copy)  # it is not this part's


def test_a_state_whose_sensitivities_do_not_fit_is_refused(state: Path, tmp_path: Path) -> None:
    document = json.loads((state / STATE).read_text())
    document["sensitivities"].pop()
    (tmp_path / STATE).write_text(json.dumps(document))
    with pytest.raises(CalibrationError, match="not every layer has a sensitivity"):
        CalibrationState.open(tmp_path)


def test_the_disk_of_a_state_is_checked_with_its_sensitivities_in_mind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = open_checkpoint(source).config
    _, most, _ = sensitivity_sizes(config, 64)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=most // 2))
    with pytest.raises(OutputError, match="free some space"):
        made(source, tmp_path / "state")


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
