"""One layer's tuning: it lowers the held-out error or changes nothing, and does the same when it is done again."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mq_quant.formats.blocks import Q8F16
from mq_quant.formats.checkpoint.source import Source
from mq_quant.formats.hfq import HfqFile, open_hfq
from mq_quant.formats.hfq.stored import format_of
from mq_quant.formats.minimax import awq_scale_name, expert_of, layer_inventory
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.build_spec import RecipeChanges
from mq_quant.quantize.pipeline.statistics import ImatrixFile
from mq_quant.quantize.spec.places import choose_recipe, open_place
from mq_quant.quantize.tune.layer import LayerTask, TuneSettings, tune_layer
from mq_quant.quantize.tune.student import Matrices, StoredTensor, Student
from mq_quant.verify.model.hfq_weights import DecodedFile
from mq_quant.verify.model.reference import embed, layer_forward

CPU = torch.device("cpu")
MODELS = os.environ.get("MQ_QUANT_MODELS")
SHORT = TuneSettings(epochs=2, batch=256, step=1e-3, matrix_step=5e-4)
Make = Callable[..., LayerTask]


def stored_layer(file: HfqFile, source: Source, layer: int) -> dict[str, StoredTensor]:
    names = [*(spec.name for spec in layer_inventory(source.config, layer)), awq_scale_name(layer)]
    entries = [file.entry(name) for name in names if name in file]
    return {e.name: StoredTensor(format_of(file, e), e.shape, file.read(e.name)) for e in entries}


def build(folder: Path, output: Path, tier: str, fold_down: float = 0.0, **changes: Any) -> Path:
    recipe = choose_recipe(tier, None, str(folder))
    recipe = recipe.model_copy(update={"awq": recipe.awq.model_copy(update={"fold_down": fold_down})})
    options = RunOptions(output=output, jobs=2)
    build_file(recipe, ImatrixFile(folder / "imatrix.gguf"), options, RecipeChanges(**changes))
    return output


def task_of(folder: Path, path: Path, tokens: np.ndarray, layer: int = 0) -> LayerTask:
    """A layer with the streams that a run of the file and the source give it."""
    source = open_place(str(folder), None, 2, None)
    with open_hfq(path) as file, torch.no_grad():
        truth, own = embed(source, tokens), embed(DecodedFile(file), tokens)
        for before in range(layer):
            truth = layer_forward(source, source.config, before, truth)
            own = layer_forward(DecodedFile(file), source.config, before, own)
        target = layer_forward(source, source.config, layer, truth)
        matrices = [s.name for s in layer_inventory(source.config, layer) if s.role == "attn"]
        return LayerTask(
            source.config,
            layer,
            stored_layer(file, source, layer),
            {name: source.weight(name) for name in matrices},
            own.numpy(),
            target.numpy(),
        )


@pytest.fixture
def make(small: Path, tmp_path: Path) -> Make:
    """A task on the smallest random checkpoint."""

    def make_task(tier: str = "mq2", sequences: int = 8, layer: int = 0, **changes: Any) -> LayerTask:
        path = build(small, tmp_path / tier, tier, **{"alpha": 0.3} | changes)
        tokens = np.random.default_rng(0).integers(0, 300, (sequences, 64))
        return task_of(small, path, tokens, layer)

    return make_task


TIERS = ["mq2-mini", "mq3-lloyd", "mq4"]


@pytest.mark.parametrize("fold_down", [0.0, 0.5])
@pytest.mark.parametrize("tier", TIERS)
def test_the_student_is_the_reference_forward_of_the_file(
    small: Path, tmp_path: Path, tier: str, fold_down: float
) -> None:
    """A fold cancels between w3 and w2, so the student need not know of it."""
    path = build(small, tmp_path / "out", tier, fold_down, alpha=0.3)
    tokens = np.random.default_rng(1).integers(0, 300, (3, 40))
    task = task_of(small, path, tokens)
    with open_hfq(path) as file, torch.no_grad():
        plain = layer_forward(DecodedFile(file), task.config, 0, torch.from_numpy(task.entering))
        mine = Student.read(task.config, 0, task.stored, [CPU]).forward(torch.from_numpy(task.entering))
    torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("tier", TIERS)
def test_experts_computed_at_once_give_what_one_after_the_other_does(
    make: Make, monkeypatch: pytest.MonkeyPatch, tier: str
) -> None:
    """A GPU computes several at once."""
    task = make(tier)
    alone = tune_layer(task, SHORT)
    monkeypatch.setattr(Matrices, "together", lambda _: 2)
    at_once = tune_layer(task, SHORT)
    np.testing.assert_allclose(at_once.leaving, alone.leaving, atol=2e-3 * np.abs(alone.leaving).max())
    assert alone.after is not None
    assert at_once.after == pytest.approx(alone.after, rel=1e-2)


def test_experts_spread_over_devices_give_the_bytes_of_one(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make("mq2")
    monkeypatch.setattr(Matrices, "together", lambda _: 2)
    used: list[int] = []
    whole = Matrices.products

    def counted(
        self: Matrices, x: torch.Tensor, heads: torch.Tensor, chosen: torch.Tensor, place: int
    ) -> Any:
        used.append(place)
        return whole(self, x, heads, chosen, place)

    monkeypatch.setattr(Matrices, "products", counted)
    one, two = tune_layer(task, SHORT), tune_layer(task, SHORT, [CPU, CPU])
    assert set(used) == {0, 1}
    assert one.payloads and one.payloads.keys() == two.payloads.keys()
    for name, payload in one.payloads.items():
        np.testing.assert_array_equal(two.payloads[name], payload)
    np.testing.assert_array_equal(two.leaving, one.leaving)


def test_steps_in_bf16_lead_where_steps_in_f32_do(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a GPU multiplies them."""
    task = make("mq2")
    full = tune_layer(task, SHORT)
    monkeypatch.setattr("mq_quant.quantize.tune.layer.step_dtype", lambda _: torch.bfloat16)
    half = tune_layer(task, SHORT)
    assert full.before == half.before and full.after is not None
    assert half.after == pytest.approx(full.after, rel=2e-2)


def test_sizes_and_codes_stay(make: Make) -> None:
    task = make()
    result = tune_layer(task, SHORT)
    assert result.kept
    for name, payload in result.payloads.items():
        before = task.stored[name]
        assert payload.shape == before.payload.shape and payload.dtype == np.uint8
        if expert_of(name):
            codes = [before.format.unpack(p)[-1] for p in (before.payload, payload)]  # type: ignore[attr-defined]
            np.testing.assert_array_equal(*codes)


def test_everything_continuous_moves(make: Make) -> None:
    task = make(sequences=16)
    moved = tune_layer(task, SHORT).payloads
    still = {name.split(".", 3)[3] for name in task.stored.keys() - moved.keys() if not expert_of(name)}
    assert still == {"block_sparse_moe.e_score_correction_bias", "block_sparse_moe.gate.weight"}
    assert awq_scale_name(0) in moved


def test_what_leaves_is_computed_from_the_payloads_as_stored(make: Make) -> None:
    task = make()
    result = tune_layer(task, SHORT)
    stored = {**task.stored}
    for name, payload in result.payloads.items():
        stored[name] = replace(stored[name], payload=payload)
    again = tune_layer(replace(task, stored=stored), replace(SHORT, epochs=0))
    assert result.after == again.before
    fresh = Student.read(task.config, 0, stored, [CPU])
    with torch.no_grad():
        np.testing.assert_allclose(
            fresh.forward(torch.from_numpy(task.entering)).numpy(), result.leaving, rtol=1e-4, atol=1e-4
        )


def test_the_same_work_gives_the_same_bytes(make: Make) -> None:
    task = make()
    first, second = (tune_layer(task, SHORT) for _ in range(2))
    assert first.payloads.keys() == second.payloads.keys() and first.kept
    assert all(np.array_equal(first.payloads[name], second.payloads[name]) for name in first.payloads)
    assert first.record() == second.record()
    np.testing.assert_array_equal(first.leaving, second.leaving)


def test_another_seed_gives_other_bytes(make: Make) -> None:
    task = make()
    a, b = (tune_layer(task, replace(SHORT, seed=seed)).payloads for seed in (1, 2))
    assert any(not np.array_equal(a[name], b[name]) for name in a.keys() & b.keys())


def test_a_layer_that_gets_worse_keeps_its_form(make: Make) -> None:
    task = make()
    result = tune_layer(task, replace(SHORT, step=0.1, matrix_step=0.1))
    assert result.before is not None and result.after is not None
    assert not result.after < result.before
    assert not result.kept and result.payloads == {}
    assert result.record()["kept"] is False
    untouched = tune_layer(task, replace(SHORT, epochs=0))
    np.testing.assert_array_equal(result.leaving, untouched.leaving)


def test_training_that_diverges_keeps_the_form(make: Make) -> None:
    result = tune_layer(make(), replace(SHORT, step=1e30))
    assert not result.kept and result.after is None
    assert result.note == "layer 0 was not tuned: training led to values that are no numbers"
    assert np.isfinite(result.leaving).all()


def test_one_sequence_leaves_none_to_judge_by(make: Make) -> None:
    task = make(sequences=1)
    result = tune_layer(task, SHORT)
    assert not result.kept and result.before is result.after is None
    assert result.note == "layer 0 was not tuned: 1 sequences leave none to judge by"
    assert result.leaving.shape == task.entering.shape


def test_streams_may_lie_in_files(make: Make, tmp_path: Path) -> None:
    task = make()
    mapped = {}
    for key in ("entering", "target"):
        np.save(tmp_path / f"{key}.npy", getattr(task, key))
        mapped[key] = np.load(tmp_path / f"{key}.npy", mmap_mode="r")
    leaving = np.lib.format.open_memmap(tmp_path / "l.npy", "w+", np.float32, task.entering.shape)
    result = tune_layer(replace(task, **mapped), SHORT, leaving=leaving)
    assert result.leaving is leaving
    np.testing.assert_array_equal(leaving, tune_layer(task, SHORT).leaving)


def test_matrices_that_the_source_does_not_give_stay(make: Make) -> None:
    task = make()
    result = tune_layer(replace(task, source={}), SHORT)
    assert result.kept
    assert all(task.stored[name].format != Q8F16 for name in result.payloads)


def test_a_file_without_an_awq_scale_is_tuned(make: Make) -> None:
    task = make(alpha=0)
    stored = {name: t for name, t in task.stored.items() if name != awq_scale_name(0)}
    result = tune_layer(replace(task, stored=stored), SHORT)
    assert result.kept and awq_scale_name(0) not in result.payloads


def test_switches_of_torch_are_set_back(make: Make) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    tune_layer(make(), replace(SHORT, epochs=0))
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.skipif(not MODELS, reason="MQ_QUANT_MODELS is not set")
def test_a_trained_model_s_first_layer_gets_better(tmp_path: Path) -> None:
    assert MODELS is not None
    folder = Path(MODELS) / "trained-tiny"
    path = build(folder, tmp_path / "out", "mq2", alpha=0)
    tokens = np.load(folder / "calib_tokens.npy")[:4].reshape(32, 64)
    result = tune_layer(task_of(folder, path, tokens), TuneSettings(epochs=2, batch=256))
    assert result.kept and result.after is not None and result.before is not None
    assert result.after < result.before
