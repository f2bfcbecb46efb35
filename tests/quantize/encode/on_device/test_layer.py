"""Builds whose experts' inputs stay on a device of torch's, here the CPU: near the files of the usual way, the same for
any encoder, any number of workers, and after any interruption."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
import small_model
import torch
from build_hooks import stopped
from mq_quant.formats.blocks import LloydFormat
from mq_quant.formats.errors import CalibrationError, OutputError
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.hfq.stored import format_of
from mq_quant.kernels.runtime.host import open_backend
from mq_quant.quantize.calibrate import layer_pass, on_the_fly, source_layers
from mq_quant.quantize.calibrate.folder import CalibrationFolder
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.encode.gpu_encoder import GpuEncoder
from mq_quant.quantize.encode.on_device.layer import DeviceLayerEncoder
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.build_spec import RecipeChanges
from mq_quant.quantize.pipeline.statistics import OnTheFly
from mq_quant.quantize.spec.places import choose_recipe
from mq_quant.quantize.tune.layer import TuneSettings
from mq_quant.quantize.write.partial_file import CALIBRATION

CONFIG = {**small_model.CONFIG, "num_hidden_layers": 2, "hidden_size": 512}
TOKENS = np.random.default_rng(0).integers(0, 300, (4, 40)).astype(np.int32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two layers; no token reaches expert 1 of layer 0."""
    content = small_model.tensors(config=CONFIG)
    content["model.layers.0.block_sparse_moe.e_score_correction_bias"] = torch.tensor([9.0, -9.0, 9.0])
    folder = small_model.save(tmp_path_factory.mktemp("models") / "small", content, config=CONFIG)
    np.save(folder / "tokens.npy", TOKENS)
    return folder


@pytest.fixture
def stays(monkeypatch):
    monkeypatch.setattr(on_the_fly, "GatheredImportance", partial(on_the_fly.GatheredImportance, stays=True))


def built(source, out, tier="mq2", alpha=0.3, tuning=None, **given):
    own = OnTheFly(TokenRequest(tokens=source / "tokens.npy"), tuning=tuning)
    options = RunOptions(**{"output": out, "jobs": 2} | given)
    return build_file(choose_recipe(tier, None, str(source)), own, options, RecipeChanges(alpha=alpha))


@pytest.fixture(scope="module")
def usual(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("usual") / "out"
    built(source, out)
    return out


def codes_of(path):
    """The body of every group of every expert, levels left out."""
    out = []
    with open_hfq(path) as file:
        for entry in file.entries:
            fmt = format_of(file, entry)
            if isinstance(fmt, LloydFormat):
                payload = np.frombuffer(file.read_range(entry, 0, entry.nbytes), np.uint8)
                out.append(fmt.groups(payload)[:, 2 * fmt.levels :])
    return np.concatenate([np.concatenate([part.reshape(-1) for part in out])])


def test_the_file_is_nearly_that_of_the_usual_way(source, usual, tmp_path, stays):
    """Sums in another order round a few weights to a neighbouring level."""
    result = built(source, tmp_path / "out")
    assert result.fallbacks == ("layer 0 w2: experts 1 (1) without tokens took the layer's moment",)
    assert np.mean(codes_of(tmp_path / "out") == codes_of(usual)) > 0.97


def test_the_exponent_that_is_found_is_that_of_the_usual_way(source, tmp_path, monkeypatch):
    reports = []
    for name in ("usual", "stays"):
        built(source, tmp_path / name, alpha=None)
        with open_hfq(tmp_path / name) as file:
            reports.append(file.metadata["mq_quant"]["layers"])
        kind = partial(on_the_fly.GatheredImportance, stays=True)
        monkeypatch.setattr(on_the_fly, "GatheredImportance", kind)
    for mine, theirs in zip(*reports, strict=True):
        assert mine["alpha"] == theirs["alpha"]
        for alpha, loss in mine["alpha_losses"].items():
            assert loss == pytest.approx(theirs["alpha_losses"][alpha], rel=1e-3)


def test_loops_and_kernels_on_two_devices_give_one_file(source, tmp_path, stays, monkeypatch):
    """Kernels on a CPU are slow, so that only some experts are looked at. Loops take one expert at a time."""
    with monkeypatch.context() as patch:
        patch.setattr(DeviceLayerEncoder, "together", 1)
        built(source, tmp_path / "loops", "mq3-lloyd", jobs=1)
    monkeypatch.setattr(on_the_fly, "with_others", lambda first: (first, first))
    encoder = GpuEncoder(*(lambda: open_backend("cpu", threads=1) for _ in range(2)), streams=1)
    assert encoder.device.startswith("2 × CPU")
    with stopped(at="layer 1 expert 0") as hook:
        built(source, tmp_path / "kernels", "mq3-lloyd", jobs=3, encoder=encoder, on_begin=hook)
    encoder.close()
    built(source, tmp_path / "kernels", "mq3-lloyd")
    assert (tmp_path / "loops").read_bytes() == (tmp_path / "kernels").read_bytes()


@pytest.mark.parametrize(
    "key", ["layer 0 expert 2", "model.layers.1.self_attn.q_proj.weight", "layer 1 expert 1"]
)
def test_an_interrupted_build_gives_the_same_file(source, tmp_path, stays, key):
    """The rows are gone with the process that held them, and are made again from the stream that enters the layer."""
    built(source, tmp_path / "whole", jobs=1)
    with stopped(at=key) as hook:
        built(source, tmp_path / "out", jobs=1, on_begin=hook)
    beside = sorted(path.name for path in (tmp_path / f"out{CALIBRATION}").iterdir())
    assert not any(name.startswith("rows") for name in beside)
    built(source, tmp_path / "out", jobs=1)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_the_next_layer_is_run_while_one_is_encoded(source, tmp_path, stays, monkeypatch):
    """With room for one layer only it is run when it is begun, and the bytes are the same."""
    run, encoded, both = [], [], threading.Event()
    real = source_layers.gather_layer

    def watched(weights, config, layer, *rest, **named):
        out = real(weights, config, layer, *rest, **named)
        run.append(layer)
        if run == [0, 1]:
            both.set()
        return out

    def begin(unit):
        if unit.key == "layer 0 expert 0":
            assert not ahead or both.wait(60)  # the second layer is run by another thread meanwhile
        encoded.append((unit.key, tuple(run)))

    monkeypatch.setattr(source_layers, "gather_layer", watched)
    for ahead in (True, False):
        monkeypatch.setattr(on_the_fly, "layers_held", lambda *_: 2 if ahead else 1)  # noqa: B023
        run.clear()
        encoded.clear()
        built(source, tmp_path / str(ahead), jobs=1, on_begin=begin)
        assert run == [0, 1]
        assert dict(encoded)["layer 0 expert 1"] == ((0, 1) if ahead else (0,))
    assert (tmp_path / "True").read_bytes() == (tmp_path / "False").read_bytes()


def test_a_fault_of_the_layer_ahead_ends_the_build_which_can_be_continued(
    source, tmp_path, stays, monkeypatch
):
    built(source, tmp_path / "whole")
    real = source_layers.gather_layer

    def broken(weights, config, layer, *rest, **named):
        if layer == 1:
            raise CalibrationError("layer 1 cannot be run")
        return real(weights, config, layer, *rest, **named)

    monkeypatch.setattr(source_layers, "gather_layer", broken)
    with pytest.raises(CalibrationError, match="layer 1 cannot be run"):
        built(source, tmp_path / "out")
    monkeypatch.setattr(source_layers, "gather_layer", real)
    assert built(source, tmp_path / "out").resumed_units > 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("tuning", [None, TuneSettings(epochs=1)], ids=["calibrated", "tuned"])
def test_layers_overlap_with_the_same_bytes(tmp_path, stays, monkeypatch, tuning):
    """A tuned layer has the device for itself, but what is run ahead."""
    config = {**small_model.CONFIG, "num_hidden_layers": 4}
    source = small_model.save(tmp_path / "four", small_model.tensors(config=config), config=config)
    np.save(source / "tokens.npy", TOKENS)
    held, most = [], []

    class Watched(layer_pass.DeviceWeights):
        def __init__(self, *given):
            super().__init__(*given)
            held.append(self)
            most.append(len(held))

        def close(self):
            super().close()
            held.remove(self)

    monkeypatch.setattr(layer_pass, "DeviceWeights", Watched)
    whole = {}
    for room in (1, 2, 3):
        monkeypatch.setattr(on_the_fly, "layers_held", lambda *_: room)  # noqa: B023
        most.clear()
        built(source, tmp_path / "out", jobs=3, force=True, tuning=tuning)
        assert max(most) == room and not held
        whole[room] = (tmp_path / "out").read_bytes()
    assert whole[1] == whole[2] == whole[3]
    with stopped(at="layer 2 expert 1") as hook:
        built(source, tmp_path / "again", jobs=3, on_begin=hook, tuning=tuning)
    built(source, tmp_path / "again", jobs=3, tuning=tuning)
    assert (tmp_path / "again").read_bytes() == whole[3] and not held


def test_a_layer_that_cannot_be_kept_ends_the_build_soon(tmp_path, stays, monkeypatch):
    """Not when all is encoded: what is encoded after it would be encoded again."""
    config = {**small_model.CONFIG, "num_hidden_layers": 4}
    source = small_model.save(tmp_path / "four", small_model.tensors(config=config), config=config)
    np.save(source / "tokens.npy", TOKENS)
    real, begun = CalibrationFolder.finish_layer, []

    def full(folder, layer, *rest, **named):
        if layer == 1:
            raise OutputError("the disk is full")
        real(folder, layer, *rest, **named)

    monkeypatch.setattr(CalibrationFolder, "finish_layer", full)
    with pytest.raises(OutputError, match="the disk is full"):
        built(source, tmp_path / "out", jobs=1, on_begin=lambda unit: begun.append(unit.layer))
    assert 1 in begun and 3 not in begun
    monkeypatch.setattr(CalibrationFolder, "finish_layer", real)
    assert built(source, tmp_path / "out", jobs=1).resumed_units > 0
