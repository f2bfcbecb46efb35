"""One layer as a file stores it, in torch: its codes, all that is continuous in it, and its forward pass.

The arithmetic is that of the reference forward, but for the experts, whose inputs are divided by the AWQ scale and
rotated as the engine does it, and whose matrices stay in their stored form. A fold of w2 cancels between w3 and w2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...formats.blocks import AffineFormat, Format, LloydFormat
from ...formats.fwht import GROUP
from ...formats.machine import cores
from ...formats.minimax import (
    ModelConfig,
    awq_scale_name,
    expert_name,
    expert_of,
    layer_inventory,
    layer_prefix,
)
from ...verify.model.reference import Routing, attention, rms_norm, route
from .placement import Placement
from .products import permuted, products, returned, rotated, spread, unpacked

U8 = NDArray[np.uint8]
EXPERT_PROJECTIONS = ("w1", "w3", "w2")
BLOCK_WEIGHTS = 160 << 20
"""Weights of one projection that a GPU dequantises at a time (640 MiB in f32). Launching work for one expert after the
other would take longer than the work. Does not depend on the number of GPUs, so that sums are the same on any number.
"""
READ_TOGETHER = 32
"""Experts whose payloads are sent to a device and unpacked there at once."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its format, its shape, and its payload u8 [bytes]."""

    format: Format
    shape: tuple[int, ...]
    payload: U8


@dataclass(frozen=True)
class Matrices:
    """One projection of all experts of a layer, [R, K] each; G = R·K/256 groups.

    `heads` f32 [E, G, n] holds each group's levels, or scale and zero; `codes` u8 [E, G, 256] lie on every device that
    computes experts.
    """

    format: LloydFormat | AffineFormat
    heads: Tensor
    codes: tuple[Tensor, ...]

    @property
    def even(self) -> bool:
        """Whether levels are given by scale and zero."""
        return isinstance(self.format, AffineFormat)

    def together(self) -> int:
        """How many experts are computed at once: on a GPU blocks as even as BLOCK_WEIGHTS allows."""
        if not self.heads.is_cuda:
            return 1
        blocks = -(-self.codes[0].numel() // BLOCK_WEIGHTS)
        return -(-len(self.heads) // blocks)

    def products(self, x: Tensor, heads: Tensor, chosen: Tensor, place: int) -> Tensor:
        """x W^T f32 [B, m, R] for x [B, m, K] and the `chosen` i32 [B] experts, whose heads are f32 [B, G, n]; all
        on the device of this number.
        """
        return products(x, heads, self.codes[place], chosen, self.even)

    def enter(self, x: Tensor) -> Tensor:
        """Inputs [..., K] in the basis in which the matrices are stored."""
        return rotated(x) if self.format.rotated else x


def head_bytes(fmt: LloydFormat | AffineFormat) -> int:
    """Bytes at the beginning of a group that hold its levels, or scale and zero."""
    return 2 * fmt.levels if isinstance(fmt, LloydFormat) else 8


@dataclass(frozen=True)
class Student:
    """A layer as stored. `dense` holds, by name, f32 tensors of all that is not an expert's, the AWQ scale too if there
    is one; `experts` the matrices of w1, w3 and w2.
    """

    config: ModelConfig
    layer: int
    dense: Mapping[str, Tensor]
    experts: Mapping[str, Matrices]

    @classmethod
    def read(
        cls,
        config: ModelConfig,
        layer: int,
        stored: Mapping[str, StoredTensor],
        devices: Sequence[torch.device],
    ) -> Student:
        """The layer from its payloads, as every reader of the file decodes them.

        `stored` names each tensor of the layer, and the AWQ scale where the file has one. All lies on the first of the
        devices, over which experts are spread.
        """
        names = [spec.name for spec in layer_inventory(config, layer) if spec.role != "expert"]
        scale = awq_scale_name(layer)
        dense = {n: _decoded(stored[n], devices[0]) for n in ([*names, scale] if scale in stored else names)}
        experts = {p: _matrices(config, layer, p, stored, devices) for p in EXPERT_PROJECTIONS}
        return cls(config, layer, dense, experts)

    def reread(self, stored: Mapping[str, StoredTensor]) -> Student:
        """The layer with some tensors as these payloads give them; the codes in them are those that it has."""
        dense = {n: _decoded(t, self.dense[n].device) for n, t in stored.items() if expert_of(n) is None}
        heads = {projection: m.heads.clone() for projection, m in self.experts.items()}
        with ThreadPoolExecutor(cores()) as pool:
            for projection, mine in heads.items():
                names = {e: expert_name(self.layer, e, projection) for e in range(len(mine))}
                there = [e for e, name in names.items() if name in stored]
                if there:
                    read = list(pool.map(_heads, (stored[names[e]] for e in there)))
                    mine[there] = torch.stack(read).to(mine.device)
        return self.changed(dense, heads)

    def tensor(self, name: str) -> Tensor:
        """One of `dense`; the reference forward asks for them."""
        return self.dense[name]

    def changed(self, dense: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> Student:
        """The layer with other dense tensors (by name) and other heads (by projection); codes stay."""
        experts = {p: replace(m, heads=heads.get(p, m.heads)) for p, m in self.experts.items()}
        return replace(self, dense={**self.dense, **dense}, experts=experts)

    def forward(self, hidden: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The residual stream f32 [sequences, length, hidden] before the layer to the one after it. The experts'
        products multiply numbers of `dtype`.
        """
        cfg, prefix = self.config, layer_prefix(self.layer)
        hidden = hidden + attention(self, cfg, self.layer, hidden)
        norm = self.tensor(f"{prefix}post_attention_layernorm.weight")
        t = rms_norm(hidden, norm, cfg.rms_norm_eps).flatten(0, 1)
        return hidden + self._mix(t, route(self, cfg, self.layer, t), dtype).view_as(hidden)

    def _mix(self, t: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
        """The weighted sum of the routed experts' outputs [m, hidden] for normed inputs [m, hidden].

        Blocks of experts go to the devices in turn. All that they need is sent before any is computed, and brought back
        after that, since a copy waits for what both devices do.
        """
        count, (gate, up, down) = routing.ids.shape[1], (self.experts[p] for p in EXPERT_PROJECTIONS)
        placement = Placement.of(routing.ids, self.config.num_local_experts, gate.together())
        scale = self.dense.get(awq_scale_name(self.layer))
        x = spread(gate.enter(t if scale is None else t / scale).to(dtype), placement, count)
        places, sizes = placement.rows_and_experts()
        parts = [torch.split(permuted(m.heads, placement.order), sizes) for m in (gate, up, down)]
        given = zip(torch.split(x, places), torch.split(placement.order.int(), sizes), *parts, strict=False)
        devices = [codes.device for codes in gate.codes]
        sent = [[each.to(devices[n % len(devices)]) for each in block] for n, block in enumerate(given)]
        outputs = [self._block(n % len(devices), *block) for n, block in enumerate(sent)]
        mixed = returned(torch.cat([y.to(t.device) for y in outputs]), placement).view(len(t), count, -1)
        return (mixed * routing.weights[..., None]).sum(1)

    def _block(self, place: int, rows: Tensor, chosen: Tensor, *heads: Tensor) -> Tensor:
        """What the experts `chosen` i32 [B] make of rows [B · places, hidden], f32, on the device of this number;
        `heads` are those of gate, up and down.
        """
        gate, up, down = (self.experts[p] for p in EXPERT_PROJECTIONS)
        x = rows.view(len(chosen), -1, rows.shape[1])
        g, u = (m.products(x, of, chosen, place) for m, of in zip((gate, up), heads[:2], strict=True))
        h = down.enter(F.silu(g) * u).to(rows.dtype)
        return down.products(h, heads[2], chosen, place).flatten(0, 1)


def _decoded(tensor: StoredTensor, device: torch.device) -> Tensor:
    values = tensor.format.decode(tensor.payload).reshape(-1)[: math.prod(tensor.shape)]
    return torch.from_numpy(values.reshape(tensor.shape)).to(device)


def _rotated_format(tensor: StoredTensor) -> LloydFormat | AffineFormat:
    if not isinstance(tensor.format, LloydFormat | AffineFormat):
        raise TypeError(f"{tensor.format.name} has no codes")
    return tensor.format


def _heads(tensor: StoredTensor) -> Tensor:
    """A matrix's heads f32 [G, n], in the machine's memory."""
    fmt = _rotated_format(tensor)
    dtype = np.float16 if isinstance(fmt, LloydFormat) else np.float32
    head = np.ascontiguousarray(fmt.groups(tensor.payload)[:, : head_bytes(fmt)])
    return torch.from_numpy(head.view(dtype).astype(np.float32))


def _matrices(
    config: ModelConfig,
    layer: int,
    projection: str,
    stored: Mapping[str, StoredTensor],
    devices: Sequence[torch.device],
) -> Matrices:
    """Read one projection of all experts, unpacked on the first device some at a time."""
    tensors = [stored[expert_name(layer, e, projection)] for e in range(config.num_local_experts)]
    fmt = _rotated_format(tensors[0])
    width, dtype = head_bytes(fmt), torch.float16 if isinstance(fmt, LloydFormat) else torch.float32
    groups = math.prod(tensors[0].shape) // GROUP
    heads, codes = [], torch.empty(len(tensors), groups, GROUP, dtype=torch.uint8, device=devices[0])
    for first in range(0, len(tensors), READ_TOGETHER):
        some = tensors[first : first + READ_TOGETHER]
        raw = _together([fmt.groups(tensor.payload) for tensor in some], devices[0])
        heads.append(raw[..., :width].contiguous().view(dtype).float())
        codes[first : first + len(some)] = unpacked(raw[..., width:], fmt.bits)
    return Matrices(fmt, torch.cat(heads), tuple(codes.to(device) for device in devices))


def _together(arrays: Sequence[U8], device: torch.device) -> Tensor:
    """Arrays of one shape one after the other on a device, through page-locked memory where that is a GPU."""
    tensors = [torch.from_numpy(np.require(array, requirements="W")) for array in arrays]
    staged = torch.empty(len(tensors), *tensors[0].shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    torch.stack(tensors, out=staged)
    return staged.to(device, non_blocking=True)
