"""Memory at full width: a forward pass never holds more than about a layer's weights, however many layers there are."""

from __future__ import annotations

import dataclasses
import importlib.util
import tracemalloc
from pathlib import Path
from types import ModuleType

import pytest
from mq_quant.formats.hfq import open_hfq
from mq_quant.kernels.runtime.host import Backend
from mq_quant.verify.model import kernel_forward as kernel_model
from mq_quant.verify.stages.decode_parity import check_decode
from mq_quant.verify.stages.structure import check_structure

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """benchmarks/forward.py, which knows how to write a file of any width."""
    spec = importlib.util.spec_from_file_location("benchmark_forward", ROOT / "benchmarks" / "forward.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_full_width_file_is_held_one_layer_at_a_time(
    benchmark: ModuleType, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers as wide as M2.7's with eight experts, all of them routed to: 96 MB a layer."""
    monkeypatch.setattr(kernel_model, "RESIDENT_BYTES", 0)
    config = dataclasses.replace(benchmark.WIDE, num_local_experts=8, vocab_size=512).config()
    path = tmp_path / "wide.hfq"
    benchmark.write_random_file(path, config, "MQ2-Lloyd", "MQ4")
    tracemalloc.start()
    try:
        result = benchmark.measure(path, config, backend, 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    layer = result["largest_layer_bytes"]
    assert layer > 80e6 and path.stat().st_size > 2 * layer
    assert result["loaded_bytes_peak"] <= layer
    assert peak < 1.25 * layer, f"{peak / 1e6:.0f} MB for layers of {layer / 1e6:.0f} MB"
    assert result["read_bytes_per_token"] == result["weight_bytes_per_token"]


def test_structure_and_decode_hold_pieces(benchmark: ModuleType, backend: Backend, tmp_path: Path) -> None:
    config = dataclasses.replace(
        benchmark.WIDE, num_local_experts=8, num_hidden_layers=1, vocab_size=1 << 14
    ).config()
    path = tmp_path / "wide.hfq"
    benchmark.write_random_file(path, config, "MQ3-Lloyd", "MQ4")
    with open_hfq(path) as file:
        tracemalloc.start()
        try:
            check_structure(file)
            structure = tracemalloc.get_traced_memory()[1]
            assert check_decode(file, backend, sample=True).ok
            both = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert structure < 24e6 and both < 48e6 < path.stat().st_size / 3
