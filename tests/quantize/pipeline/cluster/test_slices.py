"""Work is cut so that every unit is done once and workers stay busy, and slow workers are overtaken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.blocks import BY_NAME
from mq_quant.quantize.pipeline.cluster.job import Slice
from mq_quant.quantize.pipeline.cluster.slices import FEWEST, cut, overtaken
from mq_quant.quantize.pipeline.work_units import WorkUnit
from mq_quant.quantize.spec.plan import PlannedTensor


def order_of(layers: int, units: int) -> list[WorkUnit]:
    """A file of one unit outside layers, layers of so many units, and another unit outside."""
    out: list[WorkUnit] = []
    for layer in (None, *range(layers), None):
        for n in range(1 if layer is None else units):
            key, start = f"{layer}.{n}.{len(out)}", 10 * len(out)
            tensor = PlannedTensor(key, BY_NAME["F16"], (10,), start, 10, layer, None)
            out.append(WorkUnit(key, start, 10, 1, (tensor,)))
    return out


@given(
    layers=st.integers(1, 9), units=st.integers(1, 40), workers=st.integers(1, 90), seed=st.integers(0, 99)
)
def test_every_missing_unit_is_in_one_slice_of_its_layer(
    layers: int, units: int, workers: int, seed: int
) -> None:
    order = order_of(layers, units)
    todo = [unit for i, unit in enumerate(order) if (i * 7 + seed) % 5]
    slices = cut(order, todo, 1000, workers)
    by_key = {unit.key: unit for unit in order}
    assert [key for piece in slices for key, _ in piece.units] == [unit.key for unit in todo]
    assert len({piece.name for piece in slices}) == len(slices)
    for piece in slices:
        assert len({by_key[key].layer for key, _ in piece.units}) == 1
        assert all(place == 1000 + by_key[key].start for key, place in piece.units)
        assert piece.weights == len(piece.units)


def test_layers_stay_whole_where_they_keep_workers_busy() -> None:
    order = order_of(62, 264)
    few, many = cut(order, order, 0, 4), cut(order, order, 0, 64)
    assert len(few) == len(cut(order, order, 0, 64, whole=True)) == 62 + 2
    assert 8 * 64 <= len(many) <= 12 * 64
    assert all(len(piece.units) >= FEWEST for piece in cut(order, order, 0, 10_000)[1:-1])


SLICES = tuple(Slice(str(n), ((str(n), n),), 1) for n in range(4))


def test_slow_slices_are_overtaken_when_workers_are_idle() -> None:
    running = {SLICES[0]: 1, SLICES[1]: 1}
    assert overtaken(running, 4, 2.5, [1.0, 1.0, 9.0]) == SLICES[:2]
    assert overtaken(running, 3, 2.5, [1.0, 1.0, 9.0]) == SLICES[:1]


def test_nothing_is_overtaken_while_it_need_not_be() -> None:
    running = {SLICES[0]: 1, SLICES[1]: 1}
    assert overtaken(running, 4, 1.5, [1.0, 1.0]) == ()  # no longer than usual
    assert overtaken(running, 2, 99.0, [1.0, 1.0]) == ()  # no worker is idle
    assert overtaken(running, 1, 99.0, [1.0, 1.0]) == ()  # a node was lost
    assert overtaken(running, 4, 99.0, [1.0]) == ()  # nobody knows yet what is usual
    assert overtaken({SLICES[0]: 2}, 4, 99.0, [1.0]) == ()  # it is done twice already
