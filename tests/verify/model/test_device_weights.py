"""FP8 matrices on their way to a device: read some at a time, and laid out in one piece of memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small_model
import torch
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.errors import CheckpointError
from mq_quant.formats.minimax import layer_inventory
from mq_quant.verify.model import device_weights
from mq_quant.verify.model.device_weights import DeviceWeights, laid_out, lay_out, places

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
    finally:
        weights.close()


def test_what_is_wrong_with_a_matrix_is_said_to_whoever_asks_for_it(tmp_path: Path) -> None:
    content = small_model.tensors()
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    content[name + "_scale_inv"] = torch.full_like(content[name + "_scale_inv"], torch.nan)
    source = open_checkpoint(small_model.save(tmp_path / "m", content))
    weights = DeviceWeights(source, [torch.device("cpu")], [name])
    try:
        with pytest.raises(CheckpointError, match=r"experts\.1\.w2"):
            weights.matrix(name)
    finally:
        weights.close()
