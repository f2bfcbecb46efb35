"""Decode parity: kernels that decode anything else than numpy are caught, and so are values that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
from mq_quant.formats.checkpoint.local import Checkpoint
from mq_quant.formats.errors import HfqError
from mq_quant.formats.hfq import TensorMeta, open_hfq, write_hfq
from mq_quant.formats.minimax import inventory
from mq_quant.kernels.forward import ops
from mq_quant.kernels.runtime.host import Backend
from mq_quant.verify.model.hfq_weights import DecodedFile
from mq_quant.verify.stages import decode_parity as decode
from mq_quant.verify.stages.decode_parity import check_decode
from plainfile import Build


def test_every_tensor_of_a_file_is_decoded(build: Build, backend: Backend) -> None:
    with open_hfq(build("MQ2-Lloyd", "MQ3-Lloyd")) as file:
        stage = check_decode(file, backend)
        assert stage.ok and stage.as_json()["tensors"] == len(file.entries)
        expected = sum(e.nbytes // {1: 2, 2: 4, 3: 34, 19: 72, 20: 112}[e.quant_type] for e in file.entries)
    assert stage.seen == expected


def test_a_sample_takes_fewer_experts_but_every_kind_of_tensor(build: Build, backend: Backend) -> None:
    with open_hfq(build()) as file:
        stage = check_decode(file, backend, sample=True)
        names = {entry.name for entry in decode.sampled(file)}
    assert stage.ok and stage.as_json()["sampled"] and stage.as_json()["tensors"] < stage.as_json()["of"]
    assert {"model.norm.weight", "lm_head.weight"} <= names
    for layer in (0, 1):
        assert sum(f"layers.{layer}." in name and ".experts." in name for name in names) == 9


@pytest.mark.parametrize("at", [0, 300, 4095])
def test_one_wrong_bit_of_a_kernel_is_found(
    build: Build, backend: Backend, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ops.decode

    def wrong(backend: Backend, payload: object, fmt: str, n: int) -> object:
        values = backend.download(right(backend, payload, fmt, n))  # type: ignore[arg-type]
        if fmt == "MQ4":
            values.view(np.uint32)[at] ^= 1
        return backend.upload(values)

    monkeypatch.setattr(decode.ops, "decode", wrong)
    with open_hfq(build()) as file:
        stage = check_decode(file, backend, sample=True)
    assert not stage.ok and all(".w2.weight" in text for text in stage.complaints)
    assert f"weight {at % 256} of group {at // 256} decodes to" in stage.complaints[0]


def test_values_that_are_not_finite_are_found(build: Build, backend: Backend) -> None:
    def change(_: object, tensors: list[tuple[TensorMeta, np.ndarray]]) -> None:
        payload = next(p for meta, p in tensors if meta.name == "model.norm.weight")
        payload.view("<f4")[77] = np.inf

    with open_hfq(build(change=change)) as file:
        stage = check_decode(file, backend)
    assert any("model.norm.weight: weight 0 of group 77 is" in text for text in stage.complaints)


def test_an_unknown_format_is_an_error(build: Build, backend: Backend) -> None:
    with open_hfq(build()) as file:
        path = file.path.with_name("unknown.hfq")
        write_hfq(path, file.metadata_bytes, [(TensorMeta("x", 99, (4,), 0, 4), np.zeros(4, np.uint8))])
    with open_hfq(path) as file, pytest.raises(HfqError, match="quant_type 99"):
        check_decode(file, backend)


def test_decoded_file_gives_back_the_original_basis(build: Build, checkpoint: Checkpoint) -> None:
    """F32 experts and a sidecar: the scale is divided out again; rotated formats come back to the same channels."""
    with open_hfq(build("F32", "F32", exact=True)) as exact, open_hfq(build("MQ6", "MQ6")) as rotated:
        for spec in inventory(checkpoint.config):
            w = checkpoint.weight(spec.name)
            np.testing.assert_allclose(DecodedFile(exact).weight(spec.name), w, rtol=1e-6)
            error = np.abs(DecodedFile(rotated).weight(spec.name) - w).mean()
            assert error < 0.05 * np.abs(w).mean()
