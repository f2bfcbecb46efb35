"""Measurements: a piece's loss is that of a model with only that piece rounded, and a killed run continues."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import hub_server
import numpy as np
import pytest
import torch
from hub_server import REPO, check_each_shard_was_fetched_once
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.checkpoint.source import Source
from mq_quant.formats.errors import InUseError, OutputError, ResumeError
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.minimax import expert_of, layer_inventory
from mq_quant.quantize.calibrate.on_the_fly import GatheredImportance
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.evaluate.reference import of_checkpoint
from mq_quant.quantize.evaluate.run import EvaluateOptions, evaluate_files
from mq_quant.quantize.fit import run as fit_run
from mq_quant.quantize.fit import streams
from mq_quant.quantize.fit.measurement import Measurement, Projection, read_measurement
from mq_quant.quantize.fit.run import WORK, MeasureResult
from mq_quant.quantize.pipeline.build import BuildResult
from mq_quant.quantize.pipeline.statistics import ImatrixFile, OnTheFly
from mq_quant.quantize.spec.places import open_place
from mq_quant.quantize.write.journal import MEASUREMENT, Journal
from mq_quant.quantize.write.layer_streams import JOURNAL
from mq_quant.quantize.write.partial_file import CALIBRATION
from mq_quant.verify.model.device_weights import DeviceWeights
from mq_quant.verify.model.hfq_weights import DecodedFile
from mq_quant.verify.model.metrics import kl_divergence
from mq_quant.verify.model.reference import Weights, layer_by_layer, logits
from numpy.typing import NDArray
from watching import Heard

Measure = Callable[..., MeasureResult]
Run = Callable[..., BuildResult]
HELD_OUT = 4
STATED = {"MQ2-Lloyd": "mq2-mini", "MQ3-Lloyd": "mq3", "MQ4": "mq4", "MQ2-Lloyd/MQ4": "mq2-lloyd"}
"""Tiers in which all layers have the formats that a measurement calls so."""


class StopError(Exception):
    """Raised where a test interrupts a run."""


def stop_at(layer: int) -> Heard:
    """A watch that ends the work when the first expert of a layer is counted."""

    def heard(doing: str) -> None:
        if doing.startswith(f"layer {layer} expert"):
            raise StopError

    return Heard(then=heard)


class OnePiece:
    """A file in which the experts are the source's but for one piece."""

    def __init__(self, source: Weights, file: Weights, layer: int, projection: Projection) -> None:
        self.source, self.file, self.layer, self.projection = source, file, layer, projection

    def weight(self, name: str) -> NDArray[np.float32]:
        place = expert_of(name)
        rounded = place is None or (
            place[0] == self.layer and (place[2] == "w2") == (self.projection == "down")
        )
        return (self.file if rounded else self.source).weight(name)


def divergence(source: Weights, other: Weights, folder: Path, ids: NDArray[np.int32]) -> float:
    """The mean KLD of a whole model, run as one."""
    config = open_checkpoint(folder).config
    found = []
    with torch.inference_mode():
        behind = [[h for _, h in layer_by_layer(w, config, ids)][-1] for w in (source, other)]
        for a, b in zip(logits(source, config, behind[0]), logits(other, config, behind[1]), strict=True):
            found.append(kl_divergence(a, b))
    return float(np.concatenate(found).mean())


def test_a_piece_is_that_of_a_file_whose_other_experts_are_the_source_s(
    measured: Measure, run: Run, small: Path, tokens: Path
) -> None:
    found, ids = measured().measurement, np.load(tokens)[-HELD_OUT:].astype(np.int32)
    source = open_checkpoint(small)
    for name, tier in (("MQ2-Lloyd", "mq2-mini"), ("MQ4", "mq4")):
        with open_hfq(run(f"out.{tier}", tier=tier).path) as file:
            for layer in range(2):
                for projection in ("gate_up", "down"):
                    model = OnePiece(source, DecodedFile(file), layer, projection)
                    expected = divergence(source, model, small, ids)
                    piece = found.pieces[2 * layer + (projection == "down")]
                    assert piece.kld[name] == pytest.approx(expected, rel=1e-4)
                    assert found.loss(layer, projection, name) == piece.kld[name] - found.rest


@pytest.mark.parametrize("effort", ["imatrix", "calibrated"])
def test_whole_models_are_what_an_evaluation_says_of_their_files(
    effort: str, measured: Measure, run: Run, small: Path, tokens: Path, tmp_path: Path
) -> None:
    """A file of each tier is built and judged: on the tokens that were held out, calibrated on the others."""
    found = measured(effort=effort).measurement
    calibrating, judging = tmp_path / "calibrating.npy", tmp_path / "judging.npy"
    np.save(calibrating, np.load(tokens)[:-HELD_OUT])
    np.save(judging, np.load(tokens)[-HELD_OUT:])
    statistics = ImatrixFile(small / "imatrix.gguf")
    if effort == "calibrated":
        statistics = OnTheFly(TokenRequest(tokens=calibrating))
    paths = [run(f"out.{t}", tier=t, statistics=statistics).path for t in STATED.values()]
    with closing(open_place(str(small), None, 2, tmp_path)) as source:
        source.validate()
        reference = of_checkpoint(source, TokenRequest(tokens=judging), source.fingerprint())
        result = evaluate_files(paths, reference, EvaluateOptions(tmp_path / "evaluation.json"))
    for name, file in zip(STATED, result.files, strict=True):
        assert found.whole[name] == pytest.approx(file.divergence.kld_mean, rel=1e-4)
    assert found.text.sha256 == result.tokens.sha256 and found.effort == effort
    if effort == "calibrated":
        assert found.calibration is not None and found.calibration.tokens == np.load(calibrating).size
    assert 0 < found.rest < found.whole["MQ4"]


def test_weights_that_lie_on_a_device_give_the_same(
    measured: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a layer's codes are sent once and become f32 there."""
    plain = measured("plain.json").measurement

    def sent(source: Source, devices: Sequence[torch.device], layer: int) -> closing[DeviceWeights]:
        names = [spec.name for spec in layer_inventory(source.config, layer)]
        return closing(DeviceWeights(source, devices, names))

    monkeypatch.setattr(streams, "layer_weights", sent)
    assert measured("sent.json").measurement == plain


def test_where_inputs_stay_on_a_device_it_is_nearly_the_same_and_continues(
    measured: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU. Sums in another order round a few weights to a neighbouring level, by which now and then a token of
    the few that judge is routed elsewhere.
    """
    plain = measured("plain.json", effort="calibrated").measurement
    monkeypatch.setattr(fit_run, "GatheredImportance", partial(GatheredImportance, stays=True))
    there = measured("there.json", effort="calibrated").measurement
    pairs = zip(there.pieces, plain.pieces, strict=True)
    ratios = np.array([piece.kld[name] / usual.kld[name] for piece, usual in pairs for name in usual.kld])
    assert np.median(np.abs(ratios - 1)) < 0.01 and np.abs(ratios - 1).max() < 0.2
    assert there.pieces != plain.pieces
    with pytest.raises(StopError):
        measured("killed.json", effort="calibrated", watch=stop_at(1))
    result = measured("killed.json", effort="calibrated")
    assert result.resumed_layers == 1 and result.measurement == there
    assert {path.name for path in tmp_path.glob("*partial*")} == set()


def test_a_killed_run_continues_to_the_same_measurement(measured: Measure, tmp_path: Path) -> None:
    whole = measured("whole.json", effort="calibrated")
    with pytest.raises(StopError):
        measured(effort="calibrated", watch=stop_at(1))
    assert not (tmp_path / "m.json").exists()
    result = measured(effort="calibrated", jobs=3)
    assert result.resumed_layers == 1 and result.measurement == whole.measurement
    assert (tmp_path / "m.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert read_measurement(tmp_path / "m.json") == result.measurement
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize("restart", [False, True])
def test_what_errors_cost_is_found_once_though_no_layer_was_measured(
    restart: bool, measured: Measure, tmp_path: Path
) -> None:
    before = {path.name for path in tmp_path.iterdir()}

    def heard(doing: str) -> None:
        if doing == "layer 1, back":
            raise StopError

    with pytest.raises(StopError):
        measured(effort="calibrated", watch=Heard(then=heard))
    assert {path.name for path in tmp_path.iterdir()} - before >= {f"m.json{CALIBRATION}"}
    again = Heard()
    measured(effort="calibrated", watch=again, restart=restart)
    assert again.doing.count("layer 1, back") == int(restart) and "layer 0, back" in again.doing
    assert {path.name for path in tmp_path.iterdir()} - before == {"m.json"}


def test_a_run_that_was_killed_at_the_head_passes_no_layer_again(
    measured: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_: object) -> dict[str, float]:
        raise StopError

    with monkeypatch.context() as patched, pytest.raises(StopError):
        patched.setattr("mq_quant.quantize.fit.run.divergences", stopped)
        measured()
    result = measured(watch=stop_at(0))
    assert result.resumed_layers == 2 and result.measurement == measured("whole.json").measurement


def test_a_damaged_stream_is_refused_and_a_restart_begins_anew(measured: Measure, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        measured(watch=stop_at(1))
    stream = tmp_path / f"m.json{WORK}" / "piece3-00001.f32"
    stream.write_bytes(b"\0" * stream.stat().st_size)
    with pytest.raises(ResumeError, match=r"piece3-00001\.f32: is not as the earlier run left it"):
        measured()
    assert measured(restart=True).resumed_layers == 0


def test_other_tokens_or_another_effort_do_not_continue(measured: Measure, tokens: Path) -> None:
    with pytest.raises(StopError):
        measured(watch=stop_at(1))
    with pytest.raises(ResumeError, match="the unfinished measurement was begun with other arguments"):
        measured(effort="calibrated")
    np.save(tokens, np.load(tokens)[::-1])
    with pytest.raises(ResumeError, match=r"tokens\.sha256"):
        measured()


def test_outputs_that_cannot_be_written_are_refused_before_any_work(
    measured: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.json").write_text("{}")
    with pytest.raises(OutputError, match="exists already"):
        measured()
    with pytest.raises(OutputError, match="its folder does not exist"):
        measured("no/m.json")
    monkeypatch.setattr("mq_quant.quantize.write.outputs.free_bytes", lambda _: 1000)
    with pytest.raises(OutputError, match=r"the work needs .* and its disk has"):
        measured("n.json")
    monkeypatch.undo()
    (tmp_path / f"busy.json{WORK}").mkdir()
    journal = Journal(tmp_path / f"busy.json{WORK}" / JOURNAL, MEASUREMENT)
    with pytest.raises(InUseError, match="another measurement is writing this output"):
        measured("busy.json")
    journal.close()
    assert measured(force=True).measurement == Measurement.model_validate(
        json.loads((tmp_path / "m.json").read_text())
    )


def test_a_source_of_the_hub_is_downloaded_once(small_hub: hub_server.HubServer, measured: Measure) -> None:
    found = measured(effort="calibrated", source=REPO).measurement
    assert found.model.origin["repository"] == REPO
    check_each_shard_was_fetched_once(small_hub)
