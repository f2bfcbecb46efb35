"""What small builds ask of a device, counted: no clock is looked at, and a change that makes a device do more is seen.

    python tests/count_harness.py  # writes the table that test_counts.py compares with

The kernels run on the CPU, in one stream. `launches` are those that the host makes, one for everything that was
recorded; `kernels` are those that run.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import small_imatrix
import small_model
from mq_quant.kernels.runtime.cpu import CpuBackend
from mq_quant.kernels.runtime.sources import Kernel
from mq_quant.quantize.calibrate import on_the_fly
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.encode.gpu_encoder import GpuEncoder
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.build_spec import RecipeChanges
from mq_quant.quantize.pipeline.statistics import ImatrixFile, OnTheFly, Statistics
from mq_quant.quantize.spec.places import choose_recipe

TABLE = Path(__file__).parent / "golden" / "counts.json"
EXPERTS = 4
Counts = dict[str, dict[str, int]]


class CountingBackend(CpuBackend):
    """A back end that counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__(threads=1)
        self.counts: Counter[str] = Counter()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        again = super().record(work)

        def counted() -> None:
            self.counts["launches"] += 1
            again()

        return counted

    def launch(self, kernel: Kernel, *rest: Any, **named: Any) -> None:
        self.counts["launches"] += self._steps is None
        super().launch(kernel, *rest, **named)

    def _dispatch(self, kernel: Kernel, grid: Any, block: Any, values: Sequence[Any], lds: int) -> None:
        self.counts["kernels"] += 1
        self.counts["blocks"] += grid[0] * grid[1] * grid[2]
        for parameter, value in zip(kernel.parameters, values, strict=True):
            if parameter.name == "sweeps":
                self.counts["sweeps"] += value.value * grid[0] * grid[1]
        super()._dispatch(kernel, grid, block, values, lds)

    def _alloc(self, nbytes: int) -> tuple[Any, int]:
        self.counts["allocations"] += 1
        return super()._alloc(nbytes)

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        self.counts["bytes on the device"] += nbytes
        super()._copy(target, source, nbytes)

    def _copy_in(self, address: int, array: np.ndarray) -> None:
        self.counts["bytes to the device"] += array.nbytes
        super()._copy_in(address, array)

    def _copy_out(self, array: np.ndarray, address: int) -> None:
        self.counts["bytes from the device"] += array.nbytes
        super()._copy_out(array, address)


def counted_build(source: Path, out: Path, statistics: Statistics) -> dict[str, int]:
    """What building a file of tier mq3-lloyd asks of a device."""
    backend = CountingBackend()
    encoder = GpuEncoder(lambda: backend, streams=1)
    options = RunOptions(output=out, jobs=1, encoder=encoder)
    build_file(choose_recipe("mq3-lloyd", None, str(source)), statistics, options, RecipeChanges(alpha=0.3))
    encoder.close()
    return dict(sorted(backend.counts.items()))


def write_source(folder: Path) -> Path:
    """One layer of four experts, with tokens and an imatrix."""
    config = {**small_model.CONFIG, "num_hidden_layers": 1, "num_local_experts": EXPERTS}
    small_model.save(folder, small_model.tensors(config=config), config=config)
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 300, (2, 40)).astype(np.int32))
    small_imatrix.save_imatrix(folder / "imatrix.gguf", layers=1, experts=EXPERTS)
    return folder


def counts(folder: Path) -> Counts:
    """The table: under an imatrix, and under moments whose factors are made on the device."""
    source = write_source(folder / "source")
    tokens = OnTheFly(TokenRequest(tokens=source / "tokens.npy"))
    kind = partial(on_the_fly.GatheredImportance, stays=True)
    with patch.object(on_the_fly, "GatheredImportance", kind):
        calibrated = counted_build(source, folder / "calibrated", tokens)
    return {
        "imatrix": counted_build(source, folder / "imatrix", ImatrixFile(source / "imatrix.gguf")),
        "calibrated": calibrated,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        TABLE.write_text(json.dumps(counts(Path(folder)), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
