"""A checkpoint of one layout and little weight, and files built from it by the plainest encoders there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mq_quant.formats.checkpoint.local import Checkpoint, open_checkpoint
from mq_quant.formats.hfq import write_hfq
from mq_quant.kernels.runtime.host import Backend, open_backend
from mq_quant.quantize.tiny.checkpoint import write_tiny
from mq_quant.quantize.tiny.folder import TinySpec
from plainfile import Build, Change, Tensors, metadata_of, tensors_of

SPEC = TinySpec(
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_local_experts=12,
    num_experts_per_tok=8,
    vocab_size=520,
    calib_shape=(2, 32),
    eval_shape=(2, 32),
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny(folder, SPEC)
    return open_checkpoint(folder)


@pytest.fixture(scope="session")
def backend() -> Iterator[Backend]:
    with open_backend("cpu") as opened:
        yield opened


@pytest.fixture(scope="session")
def build(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Write a file; `change(metadata, tensors)` tampers with it before, and `resign` makes its hashes fit again."""
    folder = tmp_path_factory.mktemp("built")
    made: dict[tuple[str, str, bool], Tensors] = {}

    def write(
        gate_up: str = "MQ2-Lloyd",
        down: str = "MQ4",
        *,
        exact: bool = False,
        change: Change | None = None,
        resign: bool = False,
        name: str = "model",
    ) -> Path:
        key = (gate_up, down, exact)
        if key not in made:
            made[key] = tensors_of(checkpoint, gate_up, down, exact)
        tensors = [(meta, payload.copy()) for meta, payload in made[key]]
        metadata = metadata_of(checkpoint, tensors)
        if change:
            change(metadata, tensors)
        if resign:
            fresh = metadata_of(checkpoint, tensors)
            metadata |= {k: fresh[k] for k in ("quantization_hash", "mq_quant")}
        path = folder / f"{name}-{len(list(folder.iterdir()))}.hfq"
        write_hfq(path, metadata, tensors)
        return path

    return write
