"""The stored form: what is written comes back, folds are found again, and a file's scale must fit its matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.blocks import BY_NAME, F16_FORMAT, F32_FORMAT, MQ2_LLOYD, MQ4, Q8F16
from mq_quant.formats.errors import HfqError, HfqKind, MqError
from mq_quant.formats.fwht import rotate
from mq_quant.formats.hfq import HfqFile, TensorMeta, open_hfq, write_hfq
from mq_quant.formats.hfq.stored import (
    RecoveredFolds,
    StoredForm,
    StoredLayer,
    awq_scale,
    config_of,
    folds_down,
    recovered_fold,
    stored_form,
)
from mq_quant.formats.minimax import awq_scale_name, expert_name

RANDOM = np.random.default_rng(8)
W = RANDOM.standard_normal((6, 512)).astype(np.float32)
SCALE = np.exp(RANDOM.normal(0, 0.5, 512)).astype(np.float16)
FOLD = np.exp2(RANDOM.integers(-3, 4, 6)).astype(np.float32)


@given(st.sampled_from(sorted(BY_NAME)), st.booleans(), st.booleans())
def test_what_is_stored_comes_back(name: str, scaled: bool, folded: bool) -> None:
    form = StoredForm(BY_NAME[name], SCALE.astype(np.float32) if scaled else None, FOLD if folded else None)
    before = W.copy()
    stored = form.to_stored(W)
    kept = stored.copy()
    np.testing.assert_allclose(form.from_stored(stored), W, atol=1e-5)
    np.testing.assert_array_equal(stored, kept)
    np.testing.assert_array_equal(W, before)


def test_the_steps_in_their_order() -> None:
    scale = SCALE.astype(np.float32)
    form = StoredForm(MQ4, scale, FOLD)
    np.testing.assert_array_equal(form.to_stored(W), rotate((W / FOLD[:, None]) * scale[None, :]))
    np.testing.assert_array_equal(form.folded(W), W / FOLD[:, None])
    assert StoredForm(F32_FORMAT).to_stored(W) is W and StoredForm(F32_FORMAT).from_stored(W) is W


def test_some_rows_come_back_as_they_do_in_the_whole() -> None:
    form = StoredForm(MQ4, SCALE.astype(np.float32), FOLD)
    stored = form.to_stored(W)
    np.testing.assert_array_equal(form.rows(2, 5).from_stored(stored[2:5]), form.from_stored(stored)[2:5])
    payload = F32_FORMAT.pack(W).reshape(-1)
    np.testing.assert_array_equal(StoredForm(F32_FORMAT).decode(payload, W.shape), W)
    np.testing.assert_array_equal(StoredForm(F32_FORMAT).decode(payload, (W.size,)), W.reshape(-1))


def test_a_layer_scales_gate_and_up_and_folds_up_into_down() -> None:
    layer = StoredLayer({"w1": MQ2_LLOYD, "w2": MQ4, "w3": MQ2_LLOYD}, SCALE)
    gate, up, down = (layer.form(p, FOLD) for p in ("w1", "w3", "w2"))
    assert (gate.format, up.format, down.format) == (MQ2_LLOYD, MQ2_LLOYD, MQ4)
    for form in (gate, up):
        assert form.scale is not None and form.scale.dtype == np.float32
        np.testing.assert_array_equal(form.scale, SCALE)
    assert gate.fold is None and up.fold is FOLD
    assert down.scale is FOLD and down.fold is None
    plain = StoredLayer(layer.formats)
    assert all(plain.form(p) == StoredForm(layer.formats[p]) for p in ("w1", "w2", "w3"))


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_fold_is_recovered_through_the_noise_of_two_bits(noise: float) -> None:
    rows = RANDOM.standard_normal((64, 256)).astype(np.float32)
    fold = np.exp2(RANDOM.integers(-8, 9, 64)).astype(np.float32)
    noisy = rows + np.float32(noise) * RANDOM.standard_normal(rows.shape).astype(np.float32)
    np.testing.assert_array_equal(recovered_fold(rows, noisy / fold[:, None]), fold)


def test_rows_that_say_nothing_have_no_fold() -> None:
    rows = np.ones((5, 256), np.float32)
    other = rows.copy()
    rows[0], other[1], rows[2], other[2] = 0, 0, 0, 0
    rows[3], other[4] = np.nan, np.inf
    with np.errstate(invalid="raise", divide="raise", over="raise"):
        np.testing.assert_array_equal(recovered_fold(rows, other), np.ones(5, np.float32))


def test_a_ratio_that_no_fold_explains_stays_visible() -> None:
    rows = np.ones((1, 256), np.float32)
    assert recovered_fold(rows, rows * np.float32(1e-30)) == 2.0**16


def test_folds_are_those_of_the_expert_that_is_asked_for() -> None:
    true = {expert_name(0, e, "w3"): RANDOM.standard_normal((8, 256)).astype(np.float32) for e in (0, 1)}
    of = {expert_name(0, e, "w3"): np.full(8, 2.0**e, np.float32) for e in (0, 1)}
    asked: list[str] = []

    def decoded(name: str) -> np.ndarray:
        asked.append(name)
        return true[name] / of[name][:, None]

    folds = RecoveredFolds(true.__getitem__, decoded)
    for e in (0, 1):
        for p, shape in (("w2", (256, 8)), ("w3", (8, 256))):
            np.testing.assert_array_equal(folds.of(expert_name(0, e, p), shape), of[expert_name(0, e, "w3")])
        assert folds.of(expert_name(0, e, "w1"), (8, 256)) is None
    assert asked == list(true), "w2 and w3 of an expert share one look at its w3"
    assert folds.of("lm_head.weight", (8, 256)) is None
    assert folds.of(expert_name(0, 1, "w2"), (256, 9)) is None, "a fold of 8 does not fit 9 columns"


# --- of a file -------------------------------------------------------------------------------------------------------


def write(path: Path, scale_shape: tuple[int, ...] | None = (256,), **metadata: Any) -> HfqFile:
    """A file of one gate and one down matrix in Q8, with a scale of 2 for the gate."""
    tensors = []
    for p in ("w1", "w2"):
        payload = np.zeros(Q8F16.nbytes(256), np.uint8)
        payload.reshape(-1, 34)[:, :3] = np.frombuffer(np.float16(1).tobytes() + b"\x06", np.uint8)
        tensors.append((TensorMeta(expert_name(3, 7, p), 3, (1, 256), 32, payload.nbytes), payload))
    if scale_shape is not None:
        values = np.full(scale_shape, 2, np.float32)
        payload = F16_FORMAT.pack(values).reshape(-1)
        tensors.append((TensorMeta(awq_scale_name(3), 1, scale_shape, 0, payload.nbytes), payload))
    write_hfq(path, metadata, tensors)
    return open_hfq(path)


def test_a_file_scales_gate_and_not_down(tmp_path: Path) -> None:
    with write(tmp_path / "a") as file:
        scale = awq_scale(file, 3, 256)
        assert scale is not None and scale.dtype == np.float32 and (scale == 2).all()
        assert awq_scale(file, 4, 256) is None
        gate = stored_form(file, expert_name(3, 7, "w1"))
        assert gate.decode(file.read(expert_name(3, 7, "w1")), (1, 256))[0, 0] == 3
        down = stored_form(file, expert_name(3, 7, "w2"))
        assert down == StoredForm(Q8F16)
    with write(tmp_path / "b", scale_shape=None) as file:
        assert stored_form(file, expert_name(3, 7, "w1")) == StoredForm(Q8F16)


@pytest.mark.parametrize("shape", [(255,), (512,), (1, 256), ()])
def test_a_scale_that_does_not_fit_is_refused_by_name(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with write(tmp_path / "a", shape) as file, pytest.raises(HfqError, match="256 columns") as e:
        stored_form(file, expert_name(3, 7, "w1"))
    assert e.value.tensor == awq_scale_name(3)
    assert e.value.kind is HfqKind.SCALE


@pytest.mark.parametrize(
    ("record", "folds"),
    [
        ({"recipe": {"awq": {"fold_down": 0.5}}}, True),
        ({"recipe": {"awq": {"fold_down": 0.0}}}, False),
        ({"recipe": {"awq": []}}, False),
        ({"recipe": None}, False),
        ([], False),
        (None, False),
    ],
)
def test_whether_a_file_folds_is_read_from_its_recipe(tmp_path: Path, record: Any, folds: bool) -> None:
    with write(tmp_path / "a", mq_quant=record) as file:
        assert folds_down(file) is folds


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (None, "no config"),
        ([], "no config"),
        ({"model_type": "llama"}, "its metadata: model_type is 'llama'"),
    ],
)
def test_a_config_that_cannot_be_used_is_told_with_its_file(
    config: object, error: str, tmp_path: Path
) -> None:
    write_hfq(tmp_path / "x", {"config": config}, [])
    with open_hfq(tmp_path / "x") as file, pytest.raises(MqError, match=error) as refused:
        config_of(file)
    assert refused.value.file == str(tmp_path / "x")
