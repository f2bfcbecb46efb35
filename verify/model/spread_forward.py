"""A layer's forward pass over several devices: sequences pass attention on all of them in turns, each expert runs where
its matrices lie, and the router on the first.

As many sequences pass attention at a time for any number of devices, and what experts put out is added on the first one
in the order of the experts, so that the bits do not depend on the number. One thread asks all devices, and waits for
none of them but for the router's choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...formats.minimax import ModelConfig, expert_name, layer_inventory
from .device_weights import DeviceWeights, all_brought
from .lanes import NO_LANES, Lanes
from .products import linear
from .reference import SILENT, Matrices, Observer, Routing, attention, by_expert, into_experts, run_expert

TOKENS = 1 << 13
"""Tokens of sequences that pass attention at a time."""
EXPERTS = 8
"""Experts that each device runs before what they put out is added. Only then do devices wait for each other: a copy
from one to another waits for all that both were asked for.
"""
ROWS = 1 << 14
"""Rows of a device from which on they are added, however few experts they are of."""


@dataclass(frozen=True)
class Tensors:
    """Some tensors of a layer on one device."""

    of: Mapping[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        """One of them; the reference forward asks for it."""
        return self.of[name]


@dataclass(frozen=True)
class Routed:
    """What experts see, on one device: normed inputs [n, H], and for each expert the indices of its tokens i64 [m] and
    what it weighs there, [m, 1].
    """

    inputs: Tensor
    tokens: Sequence[Tensor]
    shares: Sequence[Tensor]


def spread_forward(
    weights: DeviceWeights,
    cfg: ModelConfig,
    layer: int,
    hidden: Tensor,
    observer: Observer = SILENT,
    lanes: Lanes = NO_LANES,
) -> Tensor:
    """As `reference.layer_forward`. What the observer sees lies where it was made. Where nobody observes, experts may
    run beside each other in `lanes`.
    """
    hidden, inputs, routing = spread_before_experts(weights, cfg, layer, hidden, observer)
    devices = weights.devices
    there, _, sizes = routed(devices, cfg, inputs, routing)
    out = torch.zeros_like(inputs)
    for some in rounds(sizes, len(devices)):
        _add(out, there[0].tokens, _round(weights, layer, some, there, observer, lanes))
    return hidden + out.view_as(hidden)


def spread_before_experts(
    weights: DeviceWeights, cfg: ModelConfig, layer: int, hidden: Tensor, observer: Observer = SILENT
) -> tuple[Tensor, Tensor, Routing]:
    """As `reference.before_experts`."""
    there = beside_experts(weights, cfg, layer)
    hidden = _behind_attention(there, weights.devices, cfg, layer, hidden, observer)
    return hidden, *into_experts(there[0], cfg, layer, hidden, observer)


def beside_experts(weights: DeviceWeights, cfg: ModelConfig, layer: int) -> list[Tensors]:
    """The tensors of a layer but for its experts', on each of the devices."""
    first = {s.name: weights.tensor(s.name) for s in layer_inventory(cfg, layer) if s.role != "expert"}
    return [Tensors({name: t.to(device) for name, t in first.items()}) for device in weights.devices]


def _behind_attention(
    there: Sequence[Tensors],
    devices: Sequence[torch.device],
    cfg: ModelConfig,
    layer: int,
    hidden: Tensor,
    observer: Observer,
) -> Tensor:
    """The residual stream [n_seq, len, H] behind attention, whose tensors lie on each of the devices."""
    some = torch.split(hidden, max(1, TOKENS // hidden.shape[1]))
    places = [n % len(there) for n in range(len(some))]
    sent = [part.to(devices[place]) for part, place in zip(some, places, strict=True)]
    for n, place in enumerate(places):
        sent[n] = sent[n] + attention(there[place], cfg, layer, sent[n], observer)
    return torch.cat([part.to(hidden.device) for part in sent])


def routed(
    devices: Sequence[torch.device], cfg: ModelConfig, inputs: Tensor, routing: Routing
) -> tuple[list[Routed], Tensor, list[int]]:
    """What experts see, on each of the devices; and as `by_expert` gives them, the places in the router's choice and
    how many tokens each expert has.
    """
    order, sizes = by_expert(routing.ids, cfg.num_local_experts)
    tokens, shares = order // cfg.num_experts_per_tok, routing.weights.flatten()[order, None]
    there = [
        Routed(
            inputs.to(device), torch.split(tokens.to(device), sizes), torch.split(shares.to(device), sizes)
        )
        for device in devices
    ]
    return there, order, sizes


def experts_of(weights: DeviceWeights, layer: int, some: Sequence[int]) -> dict[int, Matrices]:
    """The matrices w1, w3 and w2 of some experts, where they lie."""
    names = {e: [expert_name(layer, e, w) for w in ("w1", "w3", "w2")] for e in some}
    found = weights.tensors_of([name for of_one in names.values() for name in of_one])
    return {e: (found[w1], found[w3], found[w2]) for e, (w1, w3, w2) in names.items()}


def _round(
    weights: DeviceWeights,
    layer: int,
    some: Sequence[int],
    there: Sequence[Routed],
    observer: Observer,
    lanes: Lanes,
) -> dict[int, Tensor]:
    """What some experts add to the streams of their tokens, where they lie; nothing else of them stays."""
    matrices, made = experts_of(weights, layer, some), {}
    with lanes.opened():
        for n, e in enumerate(some):
            place = weights.place(e)
            with lanes.lane(weights.devices[place], n // len(weights.devices)):
                made[e] = _run(matrices[e], layer, e, there[place], observer)
    return made


def _run(matrices: Matrices, layer: int, expert: int, seen: Routed, observer: Observer) -> Tensor:
    """What an expert adds to the streams of its tokens, [m, H], where its matrices lie."""
    x = seen.inputs[seen.tokens[expert]]
    product, made = run_expert(matrices, x, linear)
    observer.expert(layer, expert, seen.tokens[expert], x, product)
    return made.mul_(seen.shares[expert])


def _add(out: Tensor, tokens: Sequence[Tensor], made: Mapping[int, Tensor]) -> None:
    """Add to out [n, H] what experts made for their tokens, [m, H] each. All of it travels before any is added."""
    here = all_brought(made, out.device)
    for e in made:
        out.index_add_(0, tokens[e], here[e])


def rounds(sizes: Sequence[int], devices: int) -> Iterator[list[int]]:
    """The experts that are chosen, so many at a time as run before what they put out is added."""
    some, rows = [], 0
    for e, size in enumerate(sizes):
        if not size:
            continue
        some.append(e)
        rows += size
        if len(some) == devices * EXPERTS or rows >= devices * ROWS:
            yield some
            some, rows = [], 0
    if some:
        yield some
