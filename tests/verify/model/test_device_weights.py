"""FP8 matrices on their way to a device: read some at a time, and laid out in one piece of memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_model
import torch
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.checkpoint.local import Checkpoint, open_checkpoint
from mq_quant.formats.errors import CheckpointError
from mq_quant.formats.minimax import expert_name, layer_inventory
from mq_quant.verify.model import device_weights
from mq_quant.verify.model.device_weights import (
    DeviceMatrix,
    DeviceWeights,
    all_brought,
    laid_out,
    lay_out,
    places,
    values_of,
)

shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 300)), min_size=1, max_size=5)


@given(shapes, st.integers(0, 1 << 32))
def test_arrays_that_were_laid_out_are_found_again(shapes: list[tuple[int, int]], seed: int) -> None:
    random = np.random.default_rng(seed)
    arrays: list[np.ndarray] = []
    for n, shape in enumerate(shapes):
        codes = random.integers(0, 256, shape, np.uint8)
        arrays.append(codes.T if n % 2 else codes)
        arrays.append(random.standard_normal(shape).astype(np.float32))
    memory = np.full(places(arrays)[-1], 99, np.uint8)
    lay_out(arrays, memory)
    for array, tensor in zip(arrays, laid_out(arrays, torch.from_numpy(memory)), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert tensor.is_contiguous() and tensor.data_ptr() % tensor.element_size() == 0


@pytest.mark.parametrize("together", [1, 40_000, 1 << 30])
def test_weights_are_those_of_the_source_however_many_are_read_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(device_weights, "TOGETHER", together)
    source = open_checkpoint(small_model.save(tmp_path / "m", small_model.tensors()))
    names = [spec.name for spec in layer_inventory(source.config, 0)]
    weights = DeviceWeights(source, [torch.device("cpu")], names)
    try:
        for name in reversed(names):
            np.testing.assert_array_equal(weights.tensor(name).numpy(), source.weight(name))
        found = weights.tensors_of(names[::-1])
        assert sorted(found) == sorted(names)
        for name, values in found.items():
            np.testing.assert_array_equal(values.numpy(), source.weight(name))
    finally:
        weights.close()


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1 << 32))
def test_matrices_of_one_shape_become_f32_together_with_the_bits_of_each(
    count: int, rows: int, columns: int, seed: int
) -> None:
    """Whether blocks of 4 x 3 fill them or not."""
    random = torch.Generator().manual_seed(seed)
    given = [
        DeviceMatrix(
            torch.randn(rows, columns, generator=random).to(torch.float8_e4m3fn).view(torch.uint8),
            torch.rand(-(-rows // 4), -(-columns // 3), generator=random),
            (4, 3),
        )
        for _ in range(count)
    ]
    together = values_of(given)
    assert len(together) == count and all(values.is_contiguous() for values in together)
    for matrix, values in zip(given, together, strict=True):
        assert torch.equal(matrix.values(), values)
        for (row, column), value in np.ndenumerate(values.numpy()):
            code = matrix.codes[row, column].view(torch.float8_e4m3fn).float()
            assert value == code * matrix.scales[row // 4, column // 3]


def test_values_are_brought_to_a_device_by_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied to where it lies; of another device all is copied at once."""
    nowhere, here = torch.device("meta"), torch.device("cpu")
    given = {7: torch.ones(2, 3), 1: torch.ones(4, 3, device=nowhere), 5: torch.ones(1, 3)}
    copies: list[tuple[int, ...]] = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, d: copies.append(tuple(t.shape)) or to(t, d))
    found = all_brought(given, nowhere)
    assert found[1] is given[1] and copies == [(3, 3)]
    assert {key: len(value) for key, value in found.items()} == {7: 2, 1: 4, 5: 1}
    assert {value.device for value in found.values()} == {nowhere}
    few = {key: given[key] for key in (5, 7)}
    assert all(value is few[key] for key, value in all_brought(few, here).items())
    assert all_brought({1: given[1], 5: given[5]}, nowhere)[5].device == nowhere
    assert copies == [(3, 3), (1, 3)] and all_brought({}, here) == {}


class Other:
    """A source whose matrices are not FP8; notes what is read."""

    def __init__(self, inner: Checkpoint) -> None:
        self.inner, self.config, self.read = inner, inner.config, list[str]()
        self.tensors = {name: replace(info, dtype="BF16") for name, info in inner.tensors.items()}

    def stored(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError(name)

    def weight(self, name: str) -> np.ndarray:
        self.read.append(name)
        return self.inner.weight(name)


def test_what_is_not_fp8_is_read_once_and_experts_of_it_when_they_are_asked_for(tmp_path: Path) -> None:
    """A layer whose experts are as wide in memory as in f32 is not held there."""
    source = Other(open_checkpoint(small_model.save(tmp_path / "m", small_model.tensors())))
    specs = list(layer_inventory(source.config, 0))
    beside = [spec.name for spec in specs if spec.role != "expert"]
    weights = DeviceWeights(source, [torch.device("cpu")], [spec.name for spec in specs])
    try:
        for name in [*beside, *beside]:
            np.testing.assert_array_equal(weights.tensor(name).numpy(), source.inner.weight(name))
        assert sorted(source.read) == sorted(beside)
        expert = expert_name(0, 1, "w2")
        assert weights.tensor(expert).isfinite().all() and source.read[-1] == expert
    finally:
        weights.close()


@pytest.mark.parametrize("name", ["self_attn.q_norm", "block_sparse_moe.experts.1.w2"])
def test_what_is_wrong_with_a_tensor_is_said_to_whoever_asks_for_it(name: str, tmp_path: Path) -> None:
    content = small_model.tensors()
    name = f"model.layers.0.{name}.weight"
    broken = name + "_scale_inv" if "experts" in name else name
    content[broken] = torch.full_like(content[broken], torch.nan)
    source = open_checkpoint(small_model.save(tmp_path / "m", content))
    weights = DeviceWeights(source, [torch.device("cpu")], [name])
    try:
        with pytest.raises(CheckpointError, match=name):
            weights.matrix(name)
    finally:
        weights.close()
