"""One layer's encoder: the direction of the scale through the written sidecar, folds, the search, and threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import small_model
from independent import decode
from mq_quant.awq.from_imatrix import ImatrixLayer, repair
from mq_quant.awq.scale import REFERENCE_ALPHA, down_fold
from mq_quant.formats.blocks import BY_NAME, MQ2_LLOYD, MQ3_LLOYD, MQ4, MQ6, AffineFormat, Format, LloydFormat
from mq_quant.formats.errors import WeightError
from mq_quant.formats.fwht import rotate
from mq_quant.formats.hfq.stored import StoredForm
from mq_quant.formats.minimax import expert_name, parse_config
from mq_quant.quantize.encode.encoders import MatrixTask, encode_matrix
from mq_quant.quantize.encode.layer_encoder import LayerEncoder
from mq_quant.quantize.encode.prepared_layer import ALPHA_GRID, LONE_NOISE, FitSettings, hessian_of

HIDDEN, INTER, EXPERTS = 512, 256, 3
CONFIG = parse_config(small_model.CONFIG | {"hidden_size": HIDDEN, "intermediate_size": INTER})
SHAPES = {"w1": (INTER, HIDDEN), "w3": (INTER, HIDDEN), "w2": (HIDDEN, INTER)}
RANDOM = np.random.default_rng(51)
CHANNELS = {"w1": np.exp(RANDOM.normal(0, 1.6, HIDDEN)), "w2": np.exp(RANDOM.normal(0, 1.6, INTER))}
CHANNELS["w3"] = CHANNELS["w1"]
WEIGHTS = [
    {p: RANDOM.standard_t(4, shape).astype(np.float32) for p, shape in SHAPES.items()} for _ in range(EXPERTS)
]
GAIN = 1 - LONE_NOISE / CONFIG.num_experts_per_tok
ALL_MQ6 = dict.fromkeys(SHAPES, MQ6)
MIXED = {"w1": MQ2_LLOYD, "w3": MQ2_LLOYD, "w2": MQ3_LLOYD}


def importance(counts: tuple[float, ...] = (400.0, 90.0, 30.0), broken: bool = False) -> ImatrixLayer:
    diagonals, of, notes = {}, {}, []
    for p, d in CHANNELS.items():
        energy = (d * np.exp(np.random.default_rng(1).normal(0, 0.3, (EXPERTS, len(d))))).astype(np.float32)
        if broken:
            energy[1, :3] = np.inf, np.nan, -1
        diagonals[p], of[p], found = repair(energy, np.float64(counts), f"layer 1 {p}")
        notes += found
    return ImatrixLayer(1, diagonals, of, tuple(notes))


def encoder(
    formats: dict[str, Format] = MIXED, given: ImatrixLayer | None = None, **settings: object
) -> LayerEncoder:
    """An encoder that is prepared already, with an exponent of 0.5 where no other is asked for."""
    options = FitSettings(**({"awq_alpha": 0.5} | settings))  # type: ignore[arg-type]
    made = LayerEncoder(CONFIG, 1, given or importance(), formats, options)
    made.prepare(samples(made))
    return made


def samples(of: LayerEncoder) -> dict[str, np.ndarray]:
    named = {expert_name(1, e, p): WEIGHTS[e][p] for e in range(EXPERTS) for p in SHAPES}
    return {name: named[name] for name in of.needs_samples()}


def decoded(payload: np.ndarray, fmt: Format, projection: str) -> np.ndarray:
    """f64 weights by the independent decoder; the scale is still in them."""
    return decode((fmt.quant_type, SHAPES[projection], payload.tobytes()))


def snr(true: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10(np.square(true).sum() / np.square(true - found).sum()))


def output(w1: np.ndarray, w3: np.ndarray, w2: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The expert's output for inputs x [n, hidden], f64."""
    gate, up = x @ w1.T, x @ w3.T
    return (gate / (1 + np.exp(-gate)) * up) @ w2.T


def test_nothing_is_encoded_before_prepare() -> None:
    fresh = LayerEncoder(CONFIG, 1, importance(), MIXED, FitSettings())
    for use in (lambda: fresh.scale, fresh.sidecar, lambda: fresh.encode_expert(0, **WEIGHTS[0])):
        with pytest.raises(RuntimeError, match="prepare"):
            use()


@pytest.mark.parametrize("projection", SHAPES)
def test_a_width_that_is_no_multiple_of_256_is_refused_by_name(projection: str) -> None:
    narrow = {p: w[:, :250] if p == projection else w for p, w in WEIGHTS[0].items()}
    with pytest.raises(WeightError, match="250 columns") as e:
        encoder().encode_expert(2, **narrow)
    assert e.value.tensor == expert_name(1, 2, projection)


def test_the_scale_cancels_through_the_written_sidecar() -> None:
    """(W·s)·(x/s) = W·x with s as the runtime reads it, before and after the rotation, with nothing quantised."""
    made = encoder()
    s = np.frombuffer(made.sidecar().tobytes(), "<f2").astype(np.float32)
    assert s.shape == (HIDDEN,) and s.std() > 0.2
    np.testing.assert_array_equal(s, made.scale.astype(np.float32))
    w, x = WEIGHTS[0]["w1"], RANDOM.standard_normal(HIDDEN).astype(np.float32)
    y = w.astype(np.float64) @ x
    np.testing.assert_allclose((w * s) @ (x / s), y, atol=1e-3)
    np.testing.assert_allclose(rotate(w * s) @ rotate(x / s), y, atol=1e-3)


@pytest.mark.parametrize("projection", ["w1", "w3"])
def test_gate_and_up_are_stored_times_the_sidecar(projection: str) -> None:
    made = encoder(ALL_MQ6)
    s = np.frombuffer(made.sidecar().tobytes(), "<f2").astype(np.float64)
    true = WEIGHTS[1][projection].astype(np.float64)
    stored = decoded(made.encode_expert(1, **WEIGHTS[1]).payloads[projection], MQ6, projection)
    assert snr(true, stored / s) > 24
    assert snr(true, stored) < 10 and snr(true, stored * s) < 10
    x = RANDOM.standard_normal((64, HIDDEN)) * np.sqrt(CHANNELS["w1"])
    assert snr(x @ true.T, (x / s) @ stored.T) > 27


def test_down_is_stored_as_it_is() -> None:
    stored = decoded(encoder(ALL_MQ6).encode_expert(0, **WEIGHTS[0]).payloads["w2"], MQ6, "w2")
    assert snr(WEIGHTS[0]["w2"].astype(np.float64), stored) > 24


def test_weights_are_multiplied_by_the_rounded_scale() -> None:
    made, w = encoder(), WEIGHTS[0]["w1"]
    s = made.scale.astype(np.float32)
    hessian = hessian_of(importance().of(0, "w1"), s)
    want = encode_matrix(MatrixTask(w, StoredForm(MQ2_LLOYD, s), "hessian", hessian, GAIN))
    np.testing.assert_array_equal(made.encode_expert(0, **WEIGHTS[0]).payloads["w1"], want)
    unrounded = s * np.float32(1 + 2.0**-12)
    assert (
        encode_matrix(MatrixTask(w, StoredForm(MQ2_LLOYD, unrounded), "hessian", hessian, GAIN)) != want
    ).any()


@pytest.mark.parametrize("fit", ["reference", "exact", "hessian"])
def test_an_expert_computes_what_it_did(fit: str) -> None:
    """All three matrices together, through the sidecar, decoded by the independent reader."""
    made = encoder(ALL_MQ6, fit=fit)
    s = np.frombuffer(made.sidecar().tobytes(), "<f2").astype(np.float64)
    found = {p: decoded(b, MQ6, p) for p, b in made.encode_expert(0, **WEIGHTS[0]).payloads.items()}
    x = 0.02 * RANDOM.standard_normal((32, HIDDEN))
    true = output(**{p: w.astype(np.float64) for p, w in WEIGHTS[0].items()}, x=x)
    assert snr(true, output(found["w1"] / s, found["w3"] / s, found["w2"], x)) > 18


def test_a_fold_divides_rows_of_up_and_multiplies_columns_of_down() -> None:
    plain, folded = (
        encoder(ALL_MQ6, fold_down=f).encode_expert(0, **WEIGHTS[0]).payloads for f in (0.0, 0.5)
    )
    t = down_fold(importance().of(0, "w2").diagonal, 0.5).astype(np.float64)
    assert len(np.unique(t)) > 2
    np.testing.assert_array_equal(folded["w1"], plain["w1"])
    # A power of two moves a row's levels and none of its codes.
    want = decoded(plain["w3"], MQ6, "w3") / t[:, None]
    np.testing.assert_allclose(decoded(folded["w3"], MQ6, "w3"), want, rtol=1e-5, atol=1e-6)
    assert isinstance(MQ6, AffineFormat)
    np.testing.assert_array_equal(MQ6.unpack(folded["w3"])[2], MQ6.unpack(plain["w3"])[2])
    assert snr(WEIGHTS[0]["w2"] * t[None, :], decoded(folded["w2"], MQ6, "w2")) > 24


@pytest.mark.parametrize("fit", ["reference", "exact"])
def test_every_fit_folds(fit: str) -> None:
    """A recipe that asks for a fold gets it, whatever decides codes and levels."""
    plain, folded = (
        encoder(ALL_MQ6, fit=fit, fold_down=f).encode_expert(0, **WEIGHTS[0]).payloads for f in (0.0, 0.5)
    )
    t = down_fold(importance().of(0, "w2").diagonal, 0.5).astype(np.float64)
    np.testing.assert_array_equal(folded["w1"], plain["w1"])
    want = decoded(plain["w3"], MQ6, "w3") / t[:, None]
    np.testing.assert_allclose(decoded(folded["w3"], MQ6, "w3"), want, rtol=1e-5, atol=1e-6)
    assert snr(WEIGHTS[0]["w2"] * t[None, :], decoded(folded["w2"], MQ6, "w2")) > 24


def test_without_an_importance_nothing_is_folded() -> None:
    payloads = []
    for fold in (0.0, 0.5):
        made = LayerEncoder(CONFIG, 1, None, MIXED, FitSettings(fit="exact", fold_down=fold))
        made.prepare({})
        payloads.append(made.encode_expert(0, **WEIGHTS[0]).payloads)
    for p in SHAPES:
        np.testing.assert_array_equal(payloads[0][p], payloads[1][p])


def test_weights_beyond_the_levels_of_a_format_are_refused_by_name() -> None:
    made = encoder()
    large = WEIGHTS[0] | {"w3": WEIGHTS[0]["w3"] * np.float32(1e6)}
    with pytest.raises(WeightError, match="beyond 65504") as e:
        made.encode_expert(0, **large)
    assert e.value.tensor == expert_name(1, 0, "w3")


def test_a_folded_down_is_rounded_under_the_folded_hessian() -> None:
    t, w = down_fold(importance().of(0, "w2").diagonal, 0.5), WEIGHTS[0]["w2"]
    hessian = hessian_of(importance().of(0, "w2"), t)
    want = encode_matrix(MatrixTask(w, StoredForm(MQ3_LLOYD, t), "hessian", hessian, GAIN))
    np.testing.assert_array_equal(encoder(fold_down=0.5).encode_expert(0, **WEIGHTS[0]).payloads["w2"], want)


def test_a_folded_expert_computes_what_it_did() -> None:
    made = encoder(ALL_MQ6, fold_down=0.5)
    s = np.frombuffer(made.sidecar().tobytes(), "<f2").astype(np.float64)
    found = {p: decoded(b, MQ6, p) for p, b in made.encode_expert(0, **WEIGHTS[0]).payloads.items()}
    x = 0.02 * RANDOM.standard_normal((32, HIDDEN))
    true = output(**{p: w.astype(np.float64) for p, w in WEIGHTS[0].items()}, x=x)
    assert snr(true, output(found["w1"] / s, found["w3"] / s, found["w2"], x)) > 18


def test_folded_weights_that_are_not_quantised_change_outputs_by_rounding_alone() -> None:
    w, t = WEIGHTS[2], down_fold(importance().of(2, "w2").diagonal, 1.0)
    x = 0.05 * RANDOM.standard_normal((16, HIDDEN)).astype(np.float32)
    before = output(w["w1"], w["w3"], w["w2"], x)
    after = output(w["w1"], w["w3"] / t[:, None], w["w2"] * t[None, :], x)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("name", ["MQ2-Lloyd", "MQ3-Lloyd"])
def test_folded_rows_keep_their_codes_in_f16_levels(name: str) -> None:
    fmt = BY_NAME[name]
    assert isinstance(fmt, LloydFormat)
    formats = dict.fromkeys(SHAPES, fmt)
    plain, folded = (
        encoder(formats, fold_down=f).encode_expert(0, **WEIGHTS[0]).payloads["w3"] for f in (0.0, 1.0)
    )
    np.testing.assert_array_equal(fmt.unpack(folded)[1], fmt.unpack(plain)[1])


def test_the_exponent_is_the_best_of_the_grid_and_recorded() -> None:
    fresh = LayerEncoder(CONFIG, 1, importance(), MIXED, FitSettings())
    assert {n.rsplit(".", 2)[1] for n in fresh.needs_samples()} == {"w1", "w3"}
    fresh.prepare(samples(fresh))
    report = fresh.report()
    losses = {float(a): loss for a, loss in report["alpha_losses"].items()}
    assert tuple(losses) == ALPHA_GRID and 0.0 in losses
    assert report["alpha"] in ALPHA_GRID
    assert losses[report["alpha"]] == min(losses.values())
    assert len(set(losses.values())) == len(losses) and all(0 < loss < 0.3 for loss in losses.values())
    assert report["layer"] == 1 and report["fit"] == "hessian"


def test_the_search_prefers_what_loses_less_in_the_output() -> None:
    """The recorded loss of an exponent is the loss that pinning it gives, measured on the decoded weights."""
    fresh = LayerEncoder(CONFIG, 1, importance(), MIXED, FitSettings(gain=False))
    fresh.prepare(samples(fresh))
    recorded = {float(a): loss for a, loss in fresh.report()["alpha_losses"].items()}
    for alpha in (0.0, 0.5):
        pinned = encoder(awq_alpha=alpha, gain=False)
        s = pinned.scale.astype(np.float64)
        lost = kept = 0.0
        for e in range(EXPERTS):
            d = importance().of(e, "w1").diagonal
            for p in ("w1", "w3"):
                found = decoded(pinned.encode_expert(e, **WEIGHTS[e]).payloads[p], MQ2_LLOYD, p) / s
                lost += (np.square(found - WEIGHTS[e][p]) * d).sum()
                kept += (np.square(WEIGHTS[e][p].astype(np.float64)) * d).sum()
        assert recorded[alpha] == pytest.approx(lost / kept, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({"fit": "reference"}, REFERENCE_ALPHA),
        ({"fit": "exact"}, REFERENCE_ALPHA),
        ({"fit": "reference", "awq_alpha": 0.2}, 0.2),
        ({"fit": "hessian", "awq_alpha": 0.0}, 0.0),
        ({"fit": "hessian", "awq_alpha": 0.4}, 0.4),
    ],
)
def test_a_fixed_exponent_needs_no_samples(settings: dict[str, object], alpha: float) -> None:
    made = LayerEncoder(CONFIG, 1, importance(), MIXED, FitSettings(**settings))  # type: ignore[arg-type]
    assert made.needs_samples() == []
    made.prepare({})
    assert made.report()["alpha"] == alpha
    assert (made.scale == 1).all() == (alpha == 0)


def test_the_reference_scale_is_the_published_formula() -> None:
    layer = importance((1e6, 1e6, 1e6))
    made = encoder(given=layer, fit="reference", awq_alpha=None)
    v = sum(layer.diagonals[p].sum(axis=0) for p in ("w1", "w3"))
    log_s = 0.55 / 2 * np.log(v)
    want = np.clip(np.exp(log_s - log_s.mean()), 1e-2, 1e2).astype(np.float16)
    np.testing.assert_array_equal(made.scale, want)


def test_without_an_importance_nothing_is_scaled_and_rounding_is_exact() -> None:
    made = LayerEncoder(CONFIG, 1, None, MIXED, FitSettings())
    made.prepare({})
    assert made.report() | {"layer": 1, "fit": "exact", "alpha": 0.0, "fallbacks": []} == made.report()
    assert (made.scale == 1).all()
    payload = made.encode_expert(0, **WEIGHTS[0]).payloads
    np.testing.assert_array_equal(
        payload["w2"],
        encode_matrix(MatrixTask(WEIGHTS[0]["w2"], StoredForm(MQ3_LLOYD), "exact")),
    )


@pytest.mark.parametrize("fit", ["reference", "exact", "hessian"])
def test_broken_and_silent_experts_are_encoded_and_reported(fit: str) -> None:
    made = encoder(given=importance((400.0, 70.0, 0.0), broken=True), fit=fit)
    notes = made.report()["fallbacks"]
    for p in SHAPES:
        assert f"layer 1 {p}: 1 experts without tokens took the layer's mean" in notes
        assert any(n.startswith(f"layer 1 {p}: 3 non-finite or negative") for n in notes)
    s = made.scale.astype(np.float64)
    assert np.isfinite(s).all() and (s > 0).all()
    for e in range(EXPERTS):
        for p, payload in made.encode_expert(e, **WEIGHTS[e]).payloads.items():
            found = decoded(payload, MIXED[p], p) / (s if p != "w2" else 1.0)
            assert np.isfinite(found).all()
            d = CHANNELS[p]
            true = WEIGHTS[e][p].astype(np.float64)
            assert snr(true * np.sqrt(d), found * np.sqrt(d)) > 8


@pytest.mark.parametrize(("routed", "gain"), [(1, 0.5), (2, 0.75), (8, 0.9375)])
def test_the_gain_counts_on_the_noise_of_routed_experts_to_average_out(routed: int, gain: float) -> None:
    made = LayerEncoder(
        replace(CONFIG, num_experts_per_tok=routed), 1, importance(), MIXED, FitSettings(awq_alpha=0)
    )
    made.prepare({})
    hessian = hessian_of(importance().of(0, "w2"), None)
    want = encode_matrix(
        MatrixTask(WEIGHTS[0]["w2"], StoredForm(MIXED["w2"], None), "hessian", hessian, gain)
    )
    np.testing.assert_array_equal(made.encode_expert(0, **WEIGHTS[0]).payloads["w2"], want)


def test_the_gain_can_be_switched_off() -> None:
    on, off = (encoder(gain=g).encode_expert(0, **WEIGHTS[0]).payloads["w1"] for g in (True, False))
    np.testing.assert_array_equal(MQ2_LLOYD.unpack(on)[1], MQ2_LLOYD.unpack(off)[1])
    levels_on, levels_off = (MQ2_LLOYD.unpack(p)[0].astype(float) for p in (on, off))
    assert np.abs(levels_on).sum() > 1.03 * np.abs(levels_off).sum()
    for fit in ("reference", "exact"):
        same = [encoder(fit=fit, gain=g).encode_expert(0, **WEIGHTS[0]).payloads["w1"] for g in (True, False)]
        np.testing.assert_array_equal(*same)


@pytest.mark.parametrize("fit", ["reference", "hessian"])
def test_any_number_of_threads_gives_the_same_bytes(fit: str) -> None:
    made = encoder({"w1": MQ3_LLOYD, "w3": MQ2_LLOYD, "w2": MQ4}, fit=fit, fold_down=0.5)
    order = [e for _ in range(4) for e in range(EXPERTS)]
    want = [made.encode_expert(e, **WEIGHTS[e]).payloads for e in range(EXPERTS)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda e: made.encode_expert(e, **WEIGHTS[e]).payloads, order))
    for e, payloads in zip(order, found, strict=True):
        for p in SHAPES:
            np.testing.assert_array_equal(payloads[p], want[e][p])


def test_inputs_are_left_alone_and_experts_do_not_share_state() -> None:
    made = encoder(fold_down=1.0)
    before = {p: w.copy() for p, w in WEIGHTS[0].items()}
    first = made.encode_expert(0, **WEIGHTS[0]).payloads
    made.encode_expert(1, **WEIGHTS[1])
    again = made.encode_expert(0, **WEIGHTS[0]).payloads
    for p in SHAPES:
        np.testing.assert_array_equal(WEIGHTS[0][p], before[p])
        np.testing.assert_array_equal(first[p], again[p])
