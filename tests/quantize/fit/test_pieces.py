"""The experts of a layer under several choices of formats: what a build has, and what lies between."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import product as product_of
from pathlib import Path

import numpy as np
import pytest
from mq_quant.awq.importance import LayerWithRows
from mq_quant.formats.blocks import BY_NAME
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.errors import WeightError
from mq_quant.formats.minimax import PROJECTIONS, expert_name
from mq_quant.kernels.runtime.host import open_backend
from mq_quant.quantize.calibrate.on_the_fly import GatheredImportance
from mq_quant.quantize.encode.answering import product
from mq_quant.quantize.encode.gpu_encoder import GpuEncoder
from mq_quant.quantize.encode.layer_encoder import EncodedExpert, LayerEncoder
from mq_quant.quantize.encode.on_device.layer import DeviceLayerEncoder
from mq_quant.quantize.encode.prepared_layer import FitSettings
from mq_quant.quantize.fit.pieces import SOURCE, Choice, LayerPieces, Matrices, in_order
from mq_quant.quantize.fit.pieces_on_device import DevicePieces

SETTINGS = FitSettings(awq_alpha=0.3)
MIXED = Choice("MQ2-Lloyd", "MQ4")
CHOICES = (Choice("MQ2-Lloyd", None), Choice(None, "MQ4"), MIXED)


@pytest.fixture
def gathered(small: Path, tokens: Path, tmp_path: Path) -> Iterator[LayerWithRows]:
    source = open_checkpoint(small)
    found = GatheredImportance(source, np.load(tokens).astype(np.int32))
    found.open(tmp_path / "moments")
    with closing(found):
        found.begin_layer(0)
        yield found.layer(0)


def test_both_projections_are_those_of_a_build(small: Path, gathered: LayerWithRows) -> None:
    """In formats that differ from each other, which is where down is rounded on its own."""
    source = open_checkpoint(small)
    pieces = LayerPieces(source.config, 0, gathered, CHOICES, SETTINGS, source)
    formats = {"w1": BY_NAME["MQ2-Lloyd"], "w3": BY_NAME["MQ2-Lloyd"], "w2": BY_NAME["MQ4"]}
    build = LayerEncoder(source.config, 0, gathered, formats, SETTINGS)
    build.prepare({})
    for expert in range(2):
        plain = Matrices(*(source.weight(expert_name(0, expert, p)) for p in ("w1", "w3", "w2")))
        made = pieces.expert(expert)
        done = build.encode_expert(expert, *plain).payloads
        for p in PROJECTIONS:
            expected = build.stored.form(p).decode(done[p], getattr(plain, p).shape)
            np.testing.assert_array_equal(getattr(made[MIXED], p), expected)
        for name in Matrices._fields:
            np.testing.assert_array_equal(getattr(made[SOURCE], name), getattr(plain, name))


def test_a_piece_leaves_the_other_projection_unrounded(small: Path, gathered: LayerWithRows) -> None:
    source = open_checkpoint(small)
    made = LayerPieces(source.config, 0, gathered, CHOICES, SETTINGS, source).expert(0)
    plain, above, below = made[SOURCE], made[CHOICES[0]], made[CHOICES[1]]
    np.testing.assert_array_equal(below.w1, plain.w1)
    np.testing.assert_array_equal(below.w3, plain.w3)
    np.testing.assert_array_equal(above.w1, made[MIXED].w1)
    inputs = gathered.inputs(0)
    wanted = product(inputs, plain.w1, plain.w3) @ plain.w2.T
    here = product(inputs, above.w1, above.w3)
    answered, not_answered = (float(np.square(here @ w2.T - wanted).sum()) for w2 in (above.w2, plain.w2))
    assert answered < 0.8 * not_answered
    assert not np.array_equal(below.w2, plain.w2)


@pytest.fixture
def on_device(small: Path, tokens: Path, tmp_path: Path) -> Iterator[LayerWithRows]:
    """What is gathered on a GPU, here on the CPU."""
    found = GatheredImportance(
        open_checkpoint(small), np.load(tokens).astype(np.int32), stays=True, ahead=False
    )
    found.bind({"origin": {}, "files": {}}, None)
    found.open(tmp_path / "there")
    with closing(found):
        found.begin_layer(0)
        yield found.layer(0)


def test_on_a_device_they_are_those_of_a_build_there(small: Path, on_device: LayerWithRows) -> None:
    """On the streams of a GPU's encoder, here of the CPU's back end, and by the usual encoder."""
    source = open_checkpoint(small)
    formats = {"w1": BY_NAME["MQ2-Lloyd"], "w3": BY_NAME["MQ2-Lloyd"], "w2": BY_NAME["MQ4"]}
    build = DeviceLayerEncoder(source.config, 0, on_device, formats, SETTINGS)
    build.prepare({})
    ((done,),) = build.encode_together([build], [1], source)
    assert isinstance(done, EncodedExpert)
    encoder = GpuEncoder(partial(open_backend, "cpu"), streams=2)
    with closing(encoder):
        made = DevicePieces(source.config, 0, on_device, CHOICES, SETTINGS, source, encoder).expert(1)
    for p in PROJECTIONS:
        matrix = getattr(made[MIXED], p)
        np.testing.assert_array_equal(matrix, build.stored.form(p).decode(done.payloads[p], matrix.shape))


def test_on_a_device_they_are_nearly_those_of_the_usual_way(
    small: Path, gathered: LayerWithRows, on_device: LayerWithRows
) -> None:
    """Sums in another order round a few weights to a neighbouring level."""
    assert isinstance(gathered, LayerWithRows) and isinstance(on_device, LayerWithRows)
    source = open_checkpoint(small)
    usual = LayerPieces(source.config, 0, gathered, CHOICES, SETTINGS, source).expert(0)
    there = DevicePieces(source.config, 0, on_device, CHOICES, SETTINGS, source).expert(0)
    assert set(there) == set(usual)
    plain = usual[SOURCE]
    for choice, name in product_of(CHOICES, Matrices._fields):
        a, b, exact = (getattr(m, name) for m in (usual[choice], there[choice], plain))
        change, apart = (float(np.square(x.astype(np.float64)).sum()) for x in (a - exact, a - b))
        assert apart <= 0.02 * change, (choice, name)


def test_few_experts_are_held_at_a_time_and_come_in_order() -> None:
    held, most, lock = 0, 0, threading.Lock()

    class Counted:
        def expert(self, expert: int) -> dict[Choice, Matrices]:
            nonlocal held, most
            with lock:
                held += 1
                most = max(most, held)
            return {}

    found = []
    for expert, _ in in_order(Counted(), [0, 2, 3, 5, 8, 9], jobs=2):  # type: ignore[arg-type]
        found.append(expert)
        with lock:
            held -= 1
    assert found == [0, 2, 3, 5, 8, 9] and most <= 4


def test_an_expert_that_cannot_be_rounded_ends_the_work() -> None:
    class Broken:
        def expert(self, expert: int) -> dict[Choice, Matrices]:
            if expert == 1:
                raise WeightError("needs levels beyond 65504")
            return {}

    with pytest.raises(WeightError, match="needs levels"):
        list(in_order(Broken(), range(6), jobs=2))  # type: ignore[arg-type]
