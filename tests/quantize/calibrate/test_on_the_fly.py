"""Builds that gather their own calibration: the bytes of `calibrate --down full` and `build --calibration`, with the
moments of one layer at a time, whatever interrupts them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_model
import torch
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.errors import MqError, OutputError, ResumeError, TokenError
from mq_quant.formats.hfq import open_hfq
from mq_quant.quantize.calibrate import layer_pass as gather
from mq_quant.quantize.calibrate import on_the_fly as inline
from mq_quant.quantize.calibrate.folder import JOURNAL
from mq_quant.quantize.calibrate.run import CalibrationOptions, calibrate
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.cli.app import main
from mq_quant.quantize.inspect.reproduce import reproduce
from mq_quant.quantize.pipeline import worker_pool as engine
from mq_quant.quantize.pipeline.build import Options, build
from mq_quant.quantize.pipeline.build_spec import Changes, open_job
from mq_quant.quantize.spec.estimates import inline_sizes
from mq_quant.quantize.spec.places import choose_recipe
from mq_quant.quantize.write.partial_file import CALIBRATION, PARTIAL
from small_imatrix import save_imatrix

TOKENS = np.random.default_rng(0).integers(0, 300, (3, 20)).astype(np.int32)
LAYERS = 3
CONFIG = {**small_model.CONFIG, "num_hidden_layers": LAYERS}

Run = Callable[..., dict[str, Any]]


class StopError(Exception):
    """An interruption."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers; no token reaches expert 1 of layer 0."""
    content = small_model.tensors(config=CONFIG)
    content["model.layers.0.block_sparse_moe.e_score_correction_bias"] = torch.tensor([9.0, -9.0, 9.0])
    folder = small_model.save(tmp_path_factory.mktemp("models") / "small", content, shards=5, config=CONFIG)
    np.save(folder / "tokens.npy", TOKENS)
    save_imatrix(folder / "imatrix.gguf", layers=LAYERS)
    return folder


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `calibrate --down full`."""
    out = tmp_path_factory.mktemp("full") / "calib"
    calibrate(open_checkpoint(source), TOKENS, out, CalibrationOptions("full", quiet=True))
    return out


def built(source: Path, out: Path, jobs: int = 2, restart: bool = False, **changes: Any) -> dict[str, Any]:
    given = Changes(**({"alpha": 0.3} | changes))
    options = Options(out, jobs, restart=restart, quiet=True)
    with open_job(choose_recipe("mq2", None, str(source)), given, options.check) as job:
        return build(job, options)


@pytest.fixture(scope="module")
def whole(source: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that `build --calibration` makes of that folder."""
    out = tmp_path_factory.mktemp("whole") / "out"
    built(source, out, calibration=folder)
    return out.read_bytes()


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Run:
    def run_inline(name: str = "out", **given: Any) -> dict[str, Any]:
        return built(
            source, tmp_path / name, **{"inline": TokenRequest(tokens=source / "tokens.npy"), **given}
        )

    return run_inline


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that the model has been run on, in order."""
    layers: list[int] = []
    real = inline.gather_layer

    def counted(weights: Any, config: Any, layer: int, *rest: Any) -> Any:
        layers.append(layer)
        return real(weights, config, layer, *rest)

    monkeypatch.setattr(inline, "gather_layer", counted)
    return layers


@contextmanager
def stop_at(monkeypatch: pytest.MonkeyPatch, key: str) -> Iterator[None]:
    """Fail when the unit `key` is to be encoded."""
    real = engine.encode_unit

    def limited(job: Any, unit: Any, encoder: Any) -> Any:
        if unit.key == key:
            raise StopError
        return real(job, unit, encoder)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "encode_unit", limited)
        with pytest.raises(StopError):
            yield


def names(where: Path) -> list[str]:
    return sorted(path.name for path in where.iterdir())


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_file_is_that_of_a_calibration_folder_to_the_last_byte(
    jobs: int, run: Run, whole: bytes, tmp_path: Path, gathered: list[int]
) -> None:
    result = run(jobs=jobs)
    assert (tmp_path / "out").read_bytes() == whole
    assert names(tmp_path) == ["out"] and gathered == [0, 1, 2]
    assert result["coverage"] == pytest.approx(8 / 9)
    assert result["fallbacks"] == ["layer 0 w2: experts 1 (1) without tokens took the layer's moment"]


def test_it_says_what_it_was_made_with_and_the_folder_reproduces_it(
    run: Run, source: Path, folder: Path, tmp_path: Path
) -> None:
    run()
    with open_hfq(tmp_path / "out") as file:
        record = file.metadata["mq_quant"]["calibration"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert record["tokens"] == manifest["tokens"] and record["down"] == "full"
    assert reproduce(tmp_path / "out", str(source), None, 2, True, folder)["identical"]


def test_an_imatrix_stands_behind_it_too(run: Run, source: Path, folder: Path, tmp_path: Path) -> None:
    imatrix = source / "imatrix.gguf"
    assert any("imatrix behind them" in note for note in run(imatrix=imatrix)["fallbacks"])
    built(source, tmp_path / "folder", calibration=folder, imatrix=imatrix)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "folder").read_bytes()


def test_moments_of_one_layer_lie_on_the_disk_at_a_time(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = engine.encode_unit, []

    def watching(job: Any, unit: Any, encoder: Any) -> Any:
        if unit.expert == 0:
            seen.append((unit.layer, names(tmp_path / f"out{CALIBRATION}")))
            held = sum(f.stat().st_size for f in (tmp_path / f"out{CALIBRATION}").iterdir())
            assert held < job.inline.disk_bytes + 16384
        return real(job, unit, encoder)

    monkeypatch.setattr(engine, "encode_unit", watching)
    run(jobs=1)
    assert seen == [
        (0, ["hidden-00001.f32", "journal", "layer-00000.safetensors"]),
        (1, ["hidden-00002.f32", "journal", "layer-00001.safetensors"]),
        (2, ["journal", "layer-00002.safetensors"]),
    ]


@pytest.mark.parametrize(
    ("key", "again"),
    [
        ("model.embed_tokens.weight", [0, 1, 2]),
        ("model.layers.0.input_layernorm.weight", [1, 2]),
        ("layer 0 expert 2", [1, 2]),
        ("model.layers.1.self_attn.q_proj.weight", [2]),
        ("layer 2 expert 0", []),
        ("lm_head.weight", []),
    ],
)
def test_an_interrupted_build_continues_after_the_last_gathered_layer(
    key: str,
    again: list[int],
    run: Run,
    whole: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gathered: list[int],
) -> None:
    run("first", jobs=1)
    with stop_at(monkeypatch, key):
        run(jobs=1)
    gathered.clear()
    run(jobs=1)
    assert gathered == again
    assert (tmp_path / "out").read_bytes() == whole and names(tmp_path) == ["first", "out"]


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("step", ["write_layer", "finish_layer"])
def test_a_stop_while_a_layer_is_gathered_costs_that_layer(
    step: str,
    layer: int,
    run: Run,
    whole: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gathered: list[int],
) -> None:
    real = getattr(gather.CalibrationFolder, step)

    def stopping(self: Any, at: int, *rest: Any) -> Any:
        if at == layer:
            raise StopError
        return real(self, at, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(gather.CalibrationFolder, step, stopping)
        with pytest.raises(StopError):
            run()
    gathered.clear()
    run()
    assert gathered == list(range(layer, LAYERS))
    assert (tmp_path / "out").read_bytes() == whole and names(tmp_path) == ["out"]


def test_a_stop_before_the_file_has_its_name_costs_nothing(
    run: Run, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gathered: list[int]
) -> None:
    def stop(*_: Any) -> None:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr("mq_quant.quantize.write.partial_file.PartialOutput.commit", stop)
        with pytest.raises(StopError):
            run()
    gathered.clear()
    run()
    assert gathered == [] and (tmp_path / "out").read_bytes() == whole


def interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with stop_at(monkeypatch, "layer 2 expert 1"):
        run(jobs=1)


def test_moments_that_are_gone_and_needed_again_are_gathered_anew(
    run: Run, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gathered: list[int]
) -> None:
    """A unit of the first layer is found damaged when its moments have long been dropped."""
    (tmp_path / "whole").write_bytes(whole)
    with open_hfq(tmp_path / "whole") as file:
        at = file.entry("model.layers.0.block_sparse_moe.experts.2.w1.weight").offset
    interrupted(run, monkeypatch)
    data = bytearray((tmp_path / f"out{PARTIAL}").read_bytes())
    data[at] ^= 1
    (tmp_path / f"out{PARTIAL}").write_bytes(data)
    gathered.clear()
    run()
    assert gathered == [0, 1, 2] and (tmp_path / "out").read_bytes() == whole


@pytest.mark.parametrize("lost", ["folder", "layer", "hidden"])
def test_what_is_lost_beside_the_output_costs_time_only(
    lost: str, run: Run, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gathered: list[int]
) -> None:
    key = "layer 1 expert 1"
    with stop_at(monkeypatch, key):
        run(jobs=1)
    beside = tmp_path / f"out{CALIBRATION}"
    if lost == "folder":
        shutil.rmtree(beside)
    else:
        (beside / {"layer": "layer-00001.safetensors", "hidden": "hidden-00002.f32"}[lost]).unlink()
    gathered.clear()
    if lost == "hidden":
        with pytest.raises(ResumeError, match="hidden-00002"):
            run()
        run(restart=True)
    else:
        run()
    assert gathered == [0, 1, 2] and (tmp_path / "out").read_bytes() == whole


def test_other_tokens_do_not_continue_an_unfinished_build(
    run: Run, source: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(run, monkeypatch)
    np.save(tmp_path / "other.npy", TOKENS[::-1])
    other = TokenRequest(tokens=tmp_path / "other.npy")
    for given in ({"inline": other}, {"inline": TokenRequest(tokens=source / "tokens.npy", sequences=2)}):
        with pytest.raises(ResumeError, match=r"calibration\.tokens\.s"):
            run(**given)
    with pytest.raises(ResumeError, match=r"calibration\.inline is True there and None here"):
        run(inline=None, imatrix=source / "imatrix.gguf")
    assert (tmp_path / f"out{CALIBRATION}" / JOURNAL).exists()
    run(inline=other, restart=True)
    assert (tmp_path / "out").read_bytes() != whole and names(tmp_path) == ["other.npy", "out"]


def test_a_restart_leaves_what_is_not_ours(run: Run, tmp_path: Path) -> None:
    (tmp_path / f"out{CALIBRATION}").mkdir()
    (tmp_path / f"out{CALIBRATION}" / "photo.jpg").write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"photo\.jpg"):
        run(restart=True)
    assert (tmp_path / f"out{CALIBRATION}" / "photo.jpg").read_bytes() == b"precious"


def test_the_disk_is_checked_with_the_moments_in_mind(
    run: Run, source: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gathered: list[int]
) -> None:
    extra = inline_sizes(open_checkpoint(source).config, TOKENS.size).disk_bytes
    usage = shutil.disk_usage(tmp_path)
    free = len(whole) + extra // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    with pytest.raises(OutputError, match="free some space"):
        run()
    assert gathered == [] and names(tmp_path) == []


def test_tokens_of_another_vocabulary_are_refused_before_any_work(
    run: Run, tmp_path: Path, gathered: list[int]
) -> None:
    np.save(tmp_path / "bad.npy", TOKENS + 300)
    with pytest.raises(TokenError, match="outside the vocabulary"):
        run(inline=TokenRequest(tokens=tmp_path / "bad.npy"))
    with pytest.raises(TokenError, match="3 sequences, fewer than the 4"):
        np.save(tmp_path / "bad.npy", TOKENS)
        run(inline=TokenRequest(tokens=tmp_path / "bad.npy", sequences=4))
    assert gathered == [] and names(tmp_path) == ["bad.npy"]


@pytest.mark.parametrize("given", [{"no_imatrix": True, "alpha": None}, {"calibration": Path("calib")}])
def test_it_contradicts_other_importances(given: dict[str, Any], run: Run) -> None:
    with pytest.raises(MqError, match="give one of the two"):
        run(**given)


def test_the_command_takes_it(
    source: Path, whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    common = ["build", "--tier", "mq2", "--source", str(source), "-o", str(out), "--awq-alpha", "0.3"]
    with pytest.raises(SystemExit) as stopped:
        main([*common, "--calibrate-inline", "--tokens", str(source / "tokens.npy"), "--json"])
    assert stopped.value.code == 0 and json.loads(capsys.readouterr().out)["coverage"] == pytest.approx(8 / 9)
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    "args",
    [
        ("--calibrate-inline",),
        ("--tokens", "a.npy"),
        ("--text", "a.txt"),
        ("--sequences", "4"),
        ("--calibrate-inline", "--tokens", "a.npy", "--text", "b.txt"),
        ("--calibrate-inline", "--tokens", "a.npy"),
        ("--calibrate-inline", "--tokens", "a.npy", "--no-imatrix"),
        ("--calibrate-inline", "--tokens", "a.npy", "--calibration", "calib"),
    ],
)
def test_the_command_refuses_bad_arguments(
    args: tuple[str, ...], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["build", "--tier", "mq2", "--source", str(source), "-o", str(tmp_path / "out"), *args])
    assert stopped.value.code == 2 and names(tmp_path) == []
    assert "Traceback" not in capsys.readouterr().err
