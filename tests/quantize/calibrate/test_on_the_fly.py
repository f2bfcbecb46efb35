"""Builds that gather their own calibration: one file for any number of jobs, with what the experts of one layer see at
a time, whatever interrupts them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_model
import torch
from build_hooks import StopError, stopped
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.errors import CalibrationError, OutputError, ResumeError, TokenError
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.minimax import expert_name
from mq_quant.quantize.calibrate import layer_pass as gather
from mq_quant.quantize.calibrate import sensitivity, sensitivity_files, source_layers
from mq_quant.quantize.calibrate.folder import JOURNAL, hidden_file
from mq_quant.quantize.calibrate.on_the_fly import GatheredImportance
from mq_quant.quantize.calibrate.run import CalibrationOptions, calibrate
from mq_quant.quantize.calibrate.sensitivity import JOURNAL as SENSITIVITY_JOURNAL
from mq_quant.quantize.calibrate.sensitivity_files import sensitivity_file
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.cli.app import main
from mq_quant.quantize.inspect.reproduce import Inputs, reproduce
from mq_quant.quantize.pipeline.build import BuildResult, RunOptions, build_file
from mq_quant.quantize.pipeline.build_spec import RecipeChanges
from mq_quant.quantize.pipeline.statistics import ImatrixFile, MomentFolder, OnTheFly, Statistics
from mq_quant.quantize.pipeline.work_units import WorkUnit
from mq_quant.quantize.spec.calibration_sizes import inline_sizes
from mq_quant.quantize.spec.places import choose_recipe
from mq_quant.quantize.write.partial_file import CALIBRATION, PARTIAL
from small_imatrix import save_imatrix
from watching import Heard

TOKENS = np.random.default_rng(0).integers(0, 300, (3, 20)).astype(np.int32)
LAYERS = 3
CONFIG = {**small_model.CONFIG, "num_hidden_layers": LAYERS}

Run = Callable[..., BuildResult]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers; no token reaches expert 1 of layer 0."""
    content = small_model.tensors(config=CONFIG) | {"lm_head.weight": small_model.narrow_head()}
    content["model.layers.0.block_sparse_moe.e_score_correction_bias"] = torch.tensor([9.0, -9.0, 9.0])
    folder = small_model.save(tmp_path_factory.mktemp("models") / "small", content, shards=5, config=CONFIG)
    np.save(folder / "tokens.npy", TOKENS)
    save_imatrix(folder / "imatrix.gguf", layers=LAYERS)
    return folder


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `calibrate --down pooled`."""
    out = tmp_path_factory.mktemp("pooled") / "calib"
    calibrate(open_checkpoint(source), TOKENS, out, CalibrationOptions("pooled"))
    return out


def built(source: Path, out: Path, statistics: Statistics, **given: Any) -> BuildResult:
    options = RunOptions(**{"output": out, "jobs": 2} | given)
    return build_file(choose_recipe("mq2", None, str(source)), statistics, options, RecipeChanges(alpha=0.3))


def own_tokens(source: Path) -> OnTheFly:
    return OnTheFly(TokenRequest(tokens=source / "tokens.npy"))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that a build with one worker makes in one go."""
    out = tmp_path_factory.mktemp("whole") / "out"
    built(source, out, own_tokens(source), jobs=1)
    return out.read_bytes()


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Run:
    own = own_tokens(source)

    def run_on_the_fly(name: str = "out", statistics: Statistics = own, **given: Any) -> BuildResult:
        return built(source, tmp_path / name, statistics, **given)

    return run_on_the_fly


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that the model has been run on, in order."""
    layers: list[int] = []
    real = source_layers.gather_layer

    def counted(weights: Any, config: Any, layer: int, *rest: Any, **named: Any) -> Any:
        layers.append(layer)
        return real(weights, config, layer, *rest, **named)

    monkeypatch.setattr(source_layers, "gather_layer", counted)
    return layers


def names(where: Path) -> list[str]:
    return sorted(path.name for path in where.iterdir())


@pytest.mark.parametrize("jobs", [2, 3])
def test_the_bytes_do_not_depend_on_the_workers(
    jobs: int, run: Run, whole: bytes, tmp_path: Path, gathered: list[int]
) -> None:
    result = run(jobs=jobs)
    assert (tmp_path / "out").read_bytes() == whole
    assert names(tmp_path) == ["out"] and gathered == [0, 1, 2]
    assert result.coverage == pytest.approx(8 / 9)
    assert result.fallbacks == ("layer 0 w2: experts 1 (1) without tokens took the layer's moment",)


def test_only_experts_that_saw_tokens_differ_from_a_build_with_the_layers_moments(
    run: Run, whole: bytes, folder: Path, source: Path, tmp_path: Path
) -> None:
    built(source, tmp_path / "folder", MomentFolder(folder))
    (tmp_path / "whole").write_bytes(whole)
    with open_hfq(tmp_path / "whole") as own, open_hfq(tmp_path / "folder") as pooled:

        def same(expert: int) -> bool:
            name = f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"
            return np.array_equal(
                *(f.read_range(f.entry(name), 0, f.entry(name).nbytes) for f in (own, pooled))
            )

        assert [same(expert) for expert in range(3)] == [False, False, False]


def test_it_says_what_it_was_made_with_and_the_same_tokens_reproduce_it(
    run: Run, source: Path, folder: Path, tmp_path: Path
) -> None:
    run()
    with open_hfq(tmp_path / "out") as file:
        record = file.metadata["mq_quant"]["calibration"]
        assert file.metadata["mq_quant"]["recipe"]["effort"] == "calibrated"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert record["tokens"] == manifest["tokens"] and record["rows"] is True and record["text"] is None
    assert record["device"] == "cpu" and record["torch"] == torch.__version__
    assert record["sha256"] == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    tokens = TokenRequest(tokens=source / "tokens.npy")
    assert reproduce(tmp_path / "out", Inputs(str(source), tokens=tokens), 2).identical


def test_other_tokens_do_not_reproduce_it(run: Run, source: Path, folder: Path, tmp_path: Path) -> None:
    run()
    with pytest.raises(TokenError, match="tokens that mq-quant does not have"):
        reproduce(tmp_path / "out", Inputs(str(source)))
    with pytest.raises(CalibrationError, match="without a folder"):
        reproduce(tmp_path / "out", Inputs(str(source), calibration=folder))
    fewer = TokenRequest(tokens=source / "tokens.npy", sequences=2)
    with pytest.raises(TokenError, match="sequences is 3 there and 2 here"):
        reproduce(tmp_path / "out", Inputs(str(source), tokens=fewer))
    np.save(tmp_path / "other.npy", TOKENS[::-1])
    with pytest.raises(TokenError, match="sha256 is"):
        reproduce(tmp_path / "out", Inputs(str(source), tokens=TokenRequest(tokens=tmp_path / "other.npy")))


def test_an_imatrix_stands_behind_it_too(run: Run, source: Path, whole: bytes, tmp_path: Path) -> None:
    backed = OnTheFly(TokenRequest(tokens=source / "tokens.npy"), imatrix=source / "imatrix.gguf")
    assert any("imatrix behind them" in note for note in run(statistics=backed).fallbacks)
    assert (tmp_path / "out").read_bytes() != whole


def test_the_stream_behind_a_layer_is_read_once_for_all_files(source: Path, tmp_path: Path) -> None:
    found = GatheredImportance(open_checkpoint(source), TOKENS)
    found.open(tmp_path / "moments")
    with closing(found):
        for layer in (0, 1):
            found.begin_layer(layer)
            stream = found.target(layer)
            want = np.fromfile(tmp_path / "moments" / hidden_file(layer + 1), np.float32)
            np.testing.assert_array_equal(stream.reshape(-1), want)
            assert found.target(layer) is stream


def test_moments_of_one_layer_lie_on_the_disk_at_a_time(run: Run, source: Path, tmp_path: Path) -> None:
    most = inline_sizes(open_checkpoint(source).config, TOKENS.size, sensitive=True).disk_bytes
    seen = []

    def watching(unit: WorkUnit) -> None:
        if unit.expert == 0:
            here = names(tmp_path / f"out{CALIBRATION}")
            assert [n for n in here if "sensitivity" in n] == [
                *map(sensitivity_file, range(3)),
                SENSITIVITY_JOURNAL,
            ]
            seen.append((unit.layer, [n for n in here if "sensitivity" not in n]))
            assert sum(f.stat().st_size for f in (tmp_path / f"out{CALIBRATION}").iterdir()) < most + 16384

    run(jobs=1, on_begin=watching)
    assert seen == [
        (0, ["hidden-00001.f32", "journal", "layer-00000.safetensors", "rows-00000.safetensors"]),
        (1, ["hidden-00002.f32", "journal", "layer-00001.safetensors", "rows-00001.safetensors"]),
        (2, ["journal", "layer-00002.safetensors", "rows-00002.safetensors"]),
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
    gathered: list[int],
) -> None:
    with stopped(at=key) as hook:
        run(jobs=1, on_begin=hook)
    gathered.clear()
    run(jobs=1)
    assert gathered == again
    assert (tmp_path / "out").read_bytes() == whole and names(tmp_path) == ["out"]


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that gradients have been carried back through, in order."""
    layers: list[int] = []
    real = sensitivity.layer_backward

    def counted(weights: Any, config: Any, layer: int, *rest: Any) -> Any:
        layers.append(layer)
        return real(weights, config, layer, *rest)

    monkeypatch.setattr(sensitivity, "layer_backward", counted)
    return layers


def stopped_before_encoding(run: Run, at: str, **given: Any) -> None:
    """A build that is stopped while it finds what errors cost, before a byte of its file is known."""

    def stop(doing: str) -> None:
        if doing == at:
            raise StopError

    with pytest.raises(StopError):
        run(watch=Heard(then=stop), **given)


@pytest.mark.parametrize(
    ("at", "again"), [("layer 1", [2, 1]), ("layer 2, back", [1]), ("layer 0, back", [])]
)
def test_a_build_that_is_stopped_before_it_encodes_continues_there(
    at: str, again: list[int], run: Run, whole: bytes, tmp_path: Path, backwards: list[int]
) -> None:
    stopped_before_encoding(run, at)
    assert names(tmp_path) == [f"out{CALIBRATION}"]
    backwards.clear()
    run()
    assert backwards == again
    assert (tmp_path / "out").read_bytes() == whole and names(tmp_path) == ["out"]


def test_the_same_holds_where_it_was_killed(
    run: Run, whole: bytes, tmp_path: Path, backwards: list[int]
) -> None:
    """The unfinished file and its journal, which names nothing, lie there then."""
    stopped_before_encoding(run, "layer 2, back")
    shutil.copytree(tmp_path / f"out{CALIBRATION}", tmp_path / "kept")
    with stopped(at="layer 1 expert 1") as hook:
        run(jobs=1, on_begin=hook)
    journal = tmp_path / f"out{PARTIAL}.journal"
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])
    shutil.rmtree(tmp_path / f"out{CALIBRATION}")
    (tmp_path / "kept").rename(tmp_path / f"out{CALIBRATION}")
    backwards.clear()
    run()
    assert backwards == [1]
    assert (tmp_path / "out").read_bytes() == whole and names(tmp_path) == ["out"]


def test_other_tokens_do_not_continue_what_was_found_of_these(
    run: Run, source: Path, tmp_path: Path, backwards: list[int]
) -> None:
    stopped_before_encoding(run, "layer 2, back")
    np.save(tmp_path / "other.npy", TOKENS[::-1])
    other = OnTheFly(TokenRequest(tokens=tmp_path / "other.npy"))
    with pytest.raises(ResumeError, match=r"tokens\.sha256") as refused:
        run(statistics=other)
    assert "--restart" in str(refused.value.hint)
    backwards.clear()
    run(statistics=other, restart=True)
    assert backwards == [2, 1] and names(tmp_path) == ["other.npy", "out"]


@pytest.mark.parametrize("at", ["layer 1", "layer 2, back"])
def test_a_build_without_leaves_nothing_of_what_was_begun(
    at: str, run: Run, without: bytes, source: Path, tmp_path: Path, backwards: list[int]
) -> None:
    stopped_before_encoding(run, at)
    backwards.clear()
    run(statistics=replace(own_tokens(source), sensitivity=False))
    assert (tmp_path / "out").read_bytes() == without and names(tmp_path) == ["out"] and backwards == []


def test_streams_that_lie_there_already_need_no_more_room(
    run: Run, whole: bytes, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_before_encoding(run, "layer 2")
    held = sum(file.stat().st_blocks * 512 for file in (tmp_path / f"out{CALIBRATION}").iterdir())
    most = inline_sizes(open_checkpoint(source).config, TOKENS.size, sensitive=True).disk_bytes
    usage, room = shutil.disk_usage(tmp_path), len(whole) + most - held
    for free in (room - 16384, room + 16384):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if free < room:
            with pytest.raises(OutputError, match="free some space"):
                run()
    run()
    assert held > 3 * TOKENS.size * 1024 and (tmp_path / "out").read_bytes() == whole


def test_an_error_of_the_checkpoint_is_told_before_anything_is_encoded(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sensitivity.layer_backward
    monkeypatch.setattr(sensitivity, "layer_backward", lambda *given: real(*given) * torch.nan)
    with pytest.raises(CalibrationError, match="layer 1: no token has a finite gradient") as refused:
        run()
    assert "--no-sensitivity" in str(refused.value.hint)
    run(statistics=replace(own_tokens(source), sensitivity=False))
    assert names(tmp_path) == ["out"]


@pytest.fixture(scope="module")
def without(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a build that does not find what errors cost."""
    out = tmp_path_factory.mktemp("without") / "out"
    built(source, out, replace(own_tokens(source), sensitivity=False), jobs=1)
    return out.read_bytes()


def test_only_down_is_another_where_its_rows_answer_each_other(
    whole: bytes, without: bytes, tmp_path: Path
) -> None:
    (tmp_path / "with").write_bytes(whole)
    (tmp_path / "without").write_bytes(without)
    with open_hfq(tmp_path / "with") as a, open_hfq(tmp_path / "without") as b:
        records = [file.metadata["mq_quant"]["calibration"] for file in (a, b)]
        assert records[0].pop("sensitivity") == {"tokens": TOKENS.size} and records[0] == records[1]
        other = {
            entry.name
            for entry in a.entries
            if not np.array_equal(*(f.read_range(f.entry(entry.name), 0, entry.nbytes) for f in (a, b)))
        }
    downs = [{expert_name(layer, e, "w2") for e in range(3)} for layer in range(LAYERS)]
    saw_no_token = {expert_name(0, 1, "w2")}
    assert downs[1] | downs[2] <= other <= set.union(*downs) - saw_no_token


@pytest.mark.parametrize("sensitive", [True, False])
def test_each_is_reproduced_as_it_was_made(
    sensitive: bool, whole: bytes, without: bytes, source: Path, tmp_path: Path, backwards: list[int]
) -> None:
    (tmp_path / "out").write_bytes(whole if sensitive else without)
    inputs = Inputs(str(source), tokens=TokenRequest(tokens=source / "tokens.npy"))
    assert reproduce(tmp_path / "out", inputs, 2).identical
    assert bool(backwards) == sensitive and names(tmp_path) == ["out"]


def test_what_errors_cost_is_found_in_the_first_tokens_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity_files, "SENSITIVITY_TOKENS", 30)
    built(source, tmp_path / "out", own_tokens(source))
    with open_hfq(tmp_path / "out") as file:
        assert file.metadata["mq_quant"]["calibration"]["sensitivity"] == {"tokens": 40}


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("step", ["write_layer", "write_rows", "finish_layer"])
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

    def stopping(self: Any, at: int, *rest: Any, **named: Any) -> Any:
        if at == layer:
            raise StopError
        return real(self, at, *rest, **named)

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
        patch.setattr("mq_quant.quantize.write.partial_file.PartialFile.commit", stop)
        with pytest.raises(StopError):
            run()
    gathered.clear()
    run()
    assert gathered == [] and (tmp_path / "out").read_bytes() == whole


def interrupted(run: Run) -> None:
    with stopped(at="layer 2 expert 1") as hook:
        run(jobs=1, on_begin=hook)


def test_moments_that_are_gone_and_needed_again_are_gathered_anew(
    run: Run, whole: bytes, tmp_path: Path, gathered: list[int]
) -> None:
    """A unit of the first layer is found damaged when its moments have long been dropped."""
    (tmp_path / "whole").write_bytes(whole)
    with open_hfq(tmp_path / "whole") as file:
        at = file.entry("model.layers.0.block_sparse_moe.experts.2.w1.weight").offset
    interrupted(run)
    data = bytearray((tmp_path / f"out{PARTIAL}").read_bytes())
    data[at] ^= 1
    (tmp_path / f"out{PARTIAL}").write_bytes(data)
    gathered.clear()
    run()
    assert gathered == [0, 1, 2] and (tmp_path / "out").read_bytes() == whole


@pytest.mark.parametrize("lost", ["folder", "layer", "rows", "hidden"])
def test_what_is_lost_beside_the_output_costs_time_only(
    lost: str, run: Run, whole: bytes, tmp_path: Path, gathered: list[int]
) -> None:
    with stopped(at="layer 1 expert 1") as hook:
        run(jobs=1, on_begin=hook)
    beside = tmp_path / f"out{CALIBRATION}"
    if lost == "folder":
        shutil.rmtree(beside)
    else:
        gone = {
            "layer": "layer-00001.safetensors",
            "rows": "rows-00001.safetensors",
            "hidden": "hidden-00002.f32",
        }
        (beside / gone[lost]).unlink()
    gathered.clear()
    if lost == "hidden":
        with pytest.raises(ResumeError, match="hidden-00002"):
            run()
        run(restart=True)
    else:
        run()
    assert gathered == [0, 1, 2] and (tmp_path / "out").read_bytes() == whole


def test_other_tokens_do_not_continue_an_unfinished_build(
    run: Run, source: Path, whole: bytes, tmp_path: Path
) -> None:
    interrupted(run)
    np.save(tmp_path / "other.npy", TOKENS[::-1])
    other = OnTheFly(TokenRequest(tokens=tmp_path / "other.npy"))
    for given in (other, OnTheFly(TokenRequest(tokens=source / "tokens.npy", sequences=2))):
        with pytest.raises(ResumeError, match=r"calibration\.tokens\.s"):
            run(statistics=given)
    with pytest.raises(ResumeError, match=r"calibration\.rows is True there and None here"):
        run(statistics=ImatrixFile(source / "imatrix.gguf"))
    assert (tmp_path / f"out{CALIBRATION}" / JOURNAL).exists()
    run(statistics=other, restart=True)
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
        run(statistics=OnTheFly(TokenRequest(tokens=tmp_path / "bad.npy")))
    with pytest.raises(TokenError, match="3 sequences, fewer than the 4"):
        np.save(tmp_path / "bad.npy", TOKENS)
        run(statistics=OnTheFly(TokenRequest(tokens=tmp_path / "bad.npy", sequences=4)))
    assert gathered == [] and names(tmp_path) == ["bad.npy"]


def test_the_command_takes_it(
    source: Path, whole: bytes, without: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    common = ["build", "--tier", "mq2", "--source", str(source), "-o", str(out), "--awq-alpha", "0.3"]
    with pytest.raises(SystemExit) as stopped:
        main([*common, "--effort", "calibrated", "--tokens", str(source / "tokens.npy"), "--json"])
    assert stopped.value.code == 0 and json.loads(capsys.readouterr().out)["coverage"] == pytest.approx(8 / 9)
    assert out.read_bytes() == whole
    for options, expected in (
        (["--sensitivity"], whole),
        (["--effort", "calibrated", "--no-sensitivity"], without),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*common, *options, "--tokens", str(source / "tokens.npy"), "--force", "-q"])
        assert stopped.value.code == 0 and out.read_bytes() == expected
