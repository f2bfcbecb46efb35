"""A calibration folder as importances: moments, shrinkage, fallbacks, and the folders that are refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_fixtures import CONFIG, COUNTS, SOURCE, moment_of, set_key, write
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.awq.from_moments import MOMENT_PRIOR, CalibratedModel, load_calibration
from mq_quant.awq.importance import LayerImportance, LayerWithRows
from mq_quant.formats.errors import CalibrationError
from mq_quant.formats.minimax import ModelConfig
from mq_quant.formats.statistics.moment_file import layer_file, triangle
from mq_quant.formats.statistics.moment_folder import MANIFEST
from mq_quant.formats.statistics.triangles import (
    pack_correlation,
    pack_moment,
    unpack_correlation,
    unpack_moment,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("calib") / "full")


@pytest.fixture(scope="module")
def model(folder: Path) -> CalibratedModel:
    return load_calibration(folder, CONFIG, SOURCE)


def test_gate_and_up_share_the_moment_of_their_layer(model: CalibratedModel) -> None:
    layer = model.layer(1)
    shared = layer.of(0, "w1")
    assert shared.moment is layer.of(2, "w3").moment
    assert shared.count == 395
    np.testing.assert_array_equal(shared.moment, moment_of(101))
    np.testing.assert_array_equal(shared.diagonal, np.diag(moment_of(101)))


def test_down_is_shrunk_by_its_count_toward_the_layer(model: CalibratedModel) -> None:
    for layer in range(2):
        for e in range(3):
            n = COUNTS[layer, e]
            own = moment_of(10 * layer + e) if n else 0
            expected = (n * own + MOMENT_PRIOR * moment_of(50)) / (n + MOMENT_PRIOR)
            got = model.layer(layer).of(e, "w2")
            assert got.moment is not None and got.moment.dtype == np.float64 and got.count == n
            np.testing.assert_allclose(got.moment, expected, rtol=1e-12)
            np.testing.assert_array_equal(got.moment, got.moment.T)
            np.testing.assert_array_equal(got.diagonal, np.diag(got.moment))


def test_an_expert_without_tokens_takes_the_layers_moment_and_it_is_said(model: CalibratedModel) -> None:
    assert (model.layer(0).of(1, "w2").moment == moment_of(50)).all()
    assert model.layer(0).notes == ("layer 0 w2: experts 1 (1) without tokens took the layer's moment",)
    assert model.layer(1).notes == ("layer 1: something was left out",)
    assert model.layer(0).of(1, "w2").count == 0
    assert model.coverage == pytest.approx(5 / 6)


def test_pooled_moments_serve_every_expert(tmp_path: Path) -> None:
    layer = load_calibration(write(tmp_path / "pooled", "pooled"), CONFIG).layer(1)
    for e in range(3):
        assert (layer.of(e, "w2").moment == moment_of(50)).all()


def test_compact_moments_are_close_and_their_diagonal_exact(tmp_path: Path, model: CalibratedModel) -> None:
    compact = load_calibration(write(tmp_path / "compact", "compact"), CONFIG).layer(0)
    for e in range(3):
        a, b = compact.of(e, "w2"), model.layer(0).of(e, "w2")
        assert a.moment is not None and b.moment is not None
        np.testing.assert_allclose(a.diagonal, b.diagonal, rtol=1e-12)
        root = np.sqrt(np.outer(b.diagonal, b.diagonal))
        assert np.abs((a.moment - b.moment) / root).max() < 2**-11


def test_a_layer_is_what_the_encoder_takes_from_an_imatrix_too(model: CalibratedModel) -> None:
    layer = model.layer(0)
    assert isinstance(layer, LayerImportance) and not isinstance(layer, LayerWithRows)
    expected = 2 * COUNTS[0].sum() * np.diag(moment_of(100)).astype(np.float32)
    np.testing.assert_allclose(layer.gate_up_energy(), expected, rtol=1e-6)


@given(st.integers(1, 9), st.integers(0, 2**32 - 1), st.sets(st.integers(0, 8)))
def test_packing_keeps_a_symmetric_matrix(k: int, seed: int, silent: set[int]) -> None:
    x = np.random.default_rng(seed).normal(size=(3, k))
    x[:, [i for i in silent if i < k]] = 0
    moment = (x.T @ x / 3).astype(np.float32).astype(np.float64)
    packed = pack_moment(moment)
    assert packed.shape == (triangle(k),)
    assert (unpack_moment(packed, k) == moment).all()
    diagonal = np.diag(moment)
    got = unpack_correlation(pack_correlation(moment), diagonal)
    assert (np.diag(got) == diagonal).all() and (got == got.T).all() and np.isfinite(got).all()
    assert (np.abs(got - moment) <= 2**-11 * np.sqrt(np.outer(diagonal, diagonal)) + 1e-12).all()


def test_layer_files_are_what_the_safetensors_package_reads(folder: Path, model: CalibratedModel) -> None:
    from safetensors.numpy import load_file

    arrays, file = load_file(folder / layer_file(0)), model.layer(0).file
    assert set(arrays) == set(file.infos)
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.array(name), array, strict=True)


def other(**fields: Any) -> ModelConfig:
    return dataclasses.replace(CONFIG, **fields)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (other(num_local_experts=4), "num_local_experts is 3 there and 4 here"),
        (other(hidden_size=512), "hidden_size is 256 there and 512 here"),
        (other(rope_theta=1e4), "rope_theta"),
        (other(num_hidden_layers=1), "num_hidden_layers"),
    ],
)
def test_a_folder_of_another_model_is_refused(config: ModelConfig, problem: str, folder: Path) -> None:
    with pytest.raises(CalibrationError, match=problem):
        load_calibration(folder, config)


def changed_source(name: str, sha256: str | None) -> dict[str, Any]:
    files = {**SOURCE["files"], name: {"bytes": 1, "sha256": sha256}}
    return {"origin": {"repository": "a/b", "revision": "r2"}, "files": files}


def test_a_folder_of_another_revision_or_tokenizer_is_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "model-1.safetensors", "model-2.safetensors"):
        with pytest.raises(CalibrationError, match=f"revision is r1 there and r2 here; {name} has sha256"):
            load_calibration(folder, CONFIG, changed_source(name, "other"))


def test_texts_and_places_that_do_not_reach_the_activations_may_differ(folder: Path) -> None:
    load_calibration(folder, CONFIG, changed_source("chat_template.jinja", "new"))
    load_calibration(folder, CONFIG, {**SOURCE, "origin": {"folder": "elsewhere"}})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_key("schema", 2), "schema 2, this program reads 1"),
        (lambda m: m.pop("schema"), "schema None"),
        (set_key("down", "half"), "not a whole manifest"),
        (set_key("down", "pooled"), "down.moment: is F32"),
        (set_key("down", "compact"), "down.moment: is F32"),
        (set_key("layers", []), "not a whole manifest"),
        (lambda m: m["layers"].pop(), "not a whole manifest"),
        (set_key("layers", 0, 7), "not a whole manifest"),
        (set_key("layers", 0, "bytes", 7), "layer-00000.safetensors: is missing or not of"),
        (set_key("config", "hidden_size", "256"), "not a whole manifest"),
        (set_key("config", "hidden_size", 1 << 40), "not a whole manifest"),
        (set_key("config", "surplus", 1), "not a whole manifest"),
        (lambda m: m.pop("config"), "not a whole manifest"),
        (set_key("source", {}), "not a whole manifest"),
        (set_key("source", "files", []), "not a whole manifest"),
    ],
)
def test_a_broken_manifest_is_refused(change: Any, problem: str, tmp_path: Path) -> None:
    broken = write(tmp_path / "calib", change=change)
    with pytest.raises(CalibrationError, match=problem):
        load_calibration(broken, CONFIG, SOURCE)


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b'{"schema": NaN}', b'{"schema": 1, "schema": 1}', b"\xff"]
)
def test_a_manifest_that_is_not_json_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(raw)
    with pytest.raises(CalibrationError, match=MANIFEST):
        load_calibration(tmp_path, CONFIG)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="is not a folder"):
        load_calibration(tmp_path / "gone", CONFIG)
    with pytest.raises(CalibrationError, match="has not finished, or it holds something else"):
        load_calibration(tmp_path, CONFIG)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_layer_that_is_missing_cut_or_changed_is_refused(copy: Path) -> None:
    path = copy / layer_file(1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    changed = load_calibration(copy, CONFIG)
    changed.layer(0)
    with pytest.raises(CalibrationError, match="not what the manifest says"):
        changed.layer(1)
    path.write_bytes(whole[:-4])
    with pytest.raises(CalibrationError, match=layer_file(1)):
        load_calibration(copy, CONFIG)
    path.unlink()
    with pytest.raises(CalibrationError, match=layer_file(1)):
        load_calibration(copy, CONFIG)


def test_a_layer_cut_after_it_was_opened_is_an_error_of_ours(copy: Path) -> None:
    layer = load_calibration(copy, CONFIG).layer(1)
    (copy / layer_file(1)).write_bytes(b"")
    with pytest.raises(CalibrationError, match=r"down\.moment"):
        layer.of(0, "w2")
