"""A layer whose experts are spread over devices: the bits of one device, however many wait to be added."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import small_model
import torch
from mq_quant.formats.checkpoint.local import Checkpoint, open_checkpoint
from mq_quant.formats.errors import CheckpointError
from mq_quant.formats.minimax import expert_name, expert_of, layer_inventory
from mq_quant.quantize.calibrate.moments import LayerMoments
from mq_quant.verify.model import spread_forward as module
from mq_quant.verify.model.backward import TOGETHER, layer_backward
from mq_quant.verify.model.device_weights import DeviceWeights
from mq_quant.verify.model.lanes import Lanes
from mq_quant.verify.model.reference import Observer, layer_forward
from mq_quant.verify.model.spread_forward import spread_forward
from torch import Tensor

CPU = torch.device("cpu")
CONFIG = {**small_model.CONFIG, "num_local_experts": 8, "num_experts_per_tok": 3}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Eight experts, of which no token takes the third."""
    content = small_model.tensors(config=CONFIG)
    bias = torch.zeros(8)
    bias[2] = -9
    content["model.layers.0.block_sparse_moe.e_score_correction_bias"] = bias
    return open_checkpoint(small_model.save(tmp_path_factory.mktemp("m") / "m", content, config=CONFIG))


def sent(source: Checkpoint, devices: int) -> DeviceWeights:
    names = [spec.name for spec in layer_inventory(source.config, 0)]
    return DeviceWeights(source, [CPU] * devices, names)


def entering(source: Checkpoint) -> Tensor:
    return torch.randn(5, 20, source.config.hidden_size, generator=torch.Generator().manual_seed(3))


def run(source: Checkpoint, devices: int) -> tuple[Tensor, dict[str, np.ndarray]]:
    """The stream behind the layer, and its moments."""
    weights = sent(source, devices)
    moments = LayerMoments(source.config, 0, "compact", at_once=module.EXPERTS * devices)
    behind = spread_forward(weights, source.config, 0, entering(source), moments)
    weights.close()
    return behind, moments.finish()


def test_what_passes_at_once_has_the_bits_of_the_reference(source: Checkpoint) -> None:
    moments = LayerMoments(source.config, 0, "compact")
    behind, arrays = run(source, 1)
    assert torch.equal(layer_forward(source, source.config, 0, entering(source), moments), behind)
    want = moments.finish()
    assert moments.unseen == [2] and all((arrays[name] == want[name]).all() for name in want)


@pytest.mark.parametrize(("experts", "rows"), [(1, 1 << 14), (2, 1 << 14), (8, 1), (8, 40)])
@pytest.mark.parametrize("devices", [2, 3])
def test_streams_and_moments_are_those_of_one_device(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch, devices: int, experts: int, rows: int
) -> None:
    monkeypatch.setattr(module, "TOKENS", 40)
    behind, want = run(source, 1)
    torch.testing.assert_close(behind, layer_forward(source, source.config, 0, entering(source)))
    monkeypatch.setattr(module, "EXPERTS", experts)
    monkeypatch.setattr(module, "ROWS", rows)
    again, arrays = run(source, devices)
    assert torch.equal(again, behind) and all((arrays[name] == want[name]).all() for name in want)


def test_experts_take_turns_and_lie_where_they_run(source: Checkpoint) -> None:
    weights = sent(source, 3)
    assert [weights.place(e) for e in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]
    seen: list[int] = []

    class Seen(Observer):
        def expert(self, layer: int, expert: int, tokens: Tensor, inputs: Tensor, product: Tensor) -> None:
            seen.append(expert)
            assert len(tokens) == len(inputs) == len(product)

    spread_forward(weights, source.config, 0, entering(source), Seen())
    weights.close()
    assert seen == [0, 1, 3, 4, 5, 6, 7]


def test_an_expert_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    content = small_model.tensors(config=CONFIG)
    name = expert_name(0, 5, "w3")
    content[name + "_scale_inv"] = torch.full_like(content[name + "_scale_inv"], torch.nan)
    source = open_checkpoint(small_model.save(tmp_path / "m", content, config=CONFIG))
    weights = sent(source, 2)
    with pytest.raises(CheckpointError, match=r"experts\.5\.w3"):
        spread_forward(weights, source.config, 0, entering(source))
    weights.close()


def test_few_rows_wait(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round ends with the expert that fills it; those without a token are in none."""
    sizes = np.array([5, 0, 9, 1, 1, 1, 1, 30, 2]).tolist()
    monkeypatch.setattr(module, "ROWS", 7)
    monkeypatch.setattr(module, "EXPERTS", 2)
    assert list(module.rounds(sizes, 2)) == [[0, 2], [3, 4, 5, 6], [7], [8]]
    assert list(module.rounds(sizes, 1)) == [[0, 2], [3, 4], [5, 6], [7], [8]]
    assert list(module.rounds([0, 0], 1)) == []


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_the_way_back_has_the_bits_of_one_device_too(
    source: Checkpoint, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the way back without devices, which is compared with torch's own."""
    monkeypatch.setattr(module, "EXPERTS", at_once)
    random = np.random.default_rng(4)
    shape = (2 * TOGETHER + 1, 5, source.config.hidden_size)
    hidden, given = (torch.from_numpy(random.standard_normal(shape, np.float32)) for _ in range(2))
    want = layer_backward(source, source.config, 0, hidden, given)
    assert want.isfinite().all() and want.abs().max() > 0
    for devices in (1, 2, 3):
        weights = sent(source, devices)
        asked: list[str] = []
        given_of = weights.tensors_of
        monkeypatch.setattr(weights, "tensors_of", lambda names: asked.extend(names) or given_of(names))  # noqa: B023
        assert torch.equal(layer_backward(weights, source.config, 0, hidden, given), want)
        experts = [found[1] for name in asked if (found := expert_of(name)) is not None]
        assert len(asked) == len(experts) == 3 * 7
        assert {weights.place(e) for e in experts} == set(range(devices))
        weights.close()


def test_matrices_of_one_round_are_held_at_a_time(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXPERTS", 2)
    weights, hidden = sent(source, 1), entering(source)
    given_of, held, rounds = weights.tensors_of, list[weakref.ref[Tensor]](), list[int]()

    def noted(names: Sequence[str]) -> dict[str, Tensor]:
        assert not any(tensor() is not None for tensor in held)
        found = given_of(names)
        held[:] = map(weakref.ref, found.values())
        rounds.append(len(names) // 3)
        return found

    monkeypatch.setattr(weights, "tensors_of", noted)
    spread_forward(weights, source.config, 0, hidden)
    layer_backward(weights, source.config, 0, hidden, torch.ones_like(hidden))
    weights.close()
    assert rounds == [2, 2, 2, 1] * 2


class Noting(Lanes):
    """Lanes that note in which of them what runs; everything is to run while they are open."""

    def __init__(self) -> None:
        super().__init__([CPU])
        self.seen: list[tuple[torch.device, int]] = []
        self.open = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        self.open = True
        yield
        self.open = False

    def lane(self, device: torch.device, number: int) -> AbstractContextManager[None]:
        assert self.open
        self.seen.append((device, number))
        return nullcontext()


@pytest.mark.parametrize("devices", [1, 2])
def test_experts_take_lanes_in_turns(
    source: Checkpoint, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On each device by themselves; a round of experts begins with the first lane."""
    monkeypatch.setattr(module, "EXPERTS", 3)
    weights, hidden = sent(source, devices), entering(source)
    experts = {1: [0, 1, 2, 0, 1, 2, 0], 2: [0, 0, 1, 1, 2, 2, 0]}[devices]
    forward, back = Noting(), Noting()
    behind = spread_forward(weights, source.config, 0, hidden, lanes=forward)
    assert torch.equal(behind, spread_forward(weights, source.config, 0, hidden))
    assert [n for _, n in forward.seen] == experts
    given = torch.ones_like(hidden)
    found = layer_backward(weights, source.config, 0, hidden, given, back)
    assert torch.equal(found, layer_backward(weights, source.config, 0, hidden, given))
    assert [n for _, n in back.seen] == experts
    weights.close()
