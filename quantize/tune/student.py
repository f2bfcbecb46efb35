"""One layer as a file stores it, in torch: its codes, all that is continuous in it, and its forward pass.

The arithmetic is that of the reference forward, but for the experts, whose inputs are divided by the AWQ scale and
rotated as the engine does it, and whose matrices stay in their stored form. A fold of w2 cancels between w3 and w2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...formats.blocks import AffineFormat, Format, LloydFormat
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
BLOCK_WEIGHTS = 1 << 27
"""Weights of one projection that a GPU dequantises at a time (512 MiB in f32). Launching work for one expert after the
other would take longer than the work.
"""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its format, its shape, and its payload u8 [bytes]."""

    format: Format
    shape: tuple[int, ...]
    payload: U8


@dataclass(frozen=True)
class Matrices:
    """One projection of all experts of a layer, [R, K] each; G = R·K/256 groups.

    `heads` f32 [E, G, n] holds each group's levels, or scale and zero; `codes` u8 [G, 256] of each expert.
    """

    format: LloydFormat | AffineFormat
    heads: Tensor
    codes: tuple[Tensor, ...]

    @property
    def even(self) -> bool:
        """Whether levels are given by scale and zero."""
        return isinstance(self.format, AffineFormat)

    def codes_of(self, experts: tuple[int, ...]) -> Tensor:
        """The codes u8 [B, G, 256] of some experts."""
        return torch.stack([self.codes[e] for e in experts])

    def together(self) -> int:
        """How many experts are computed at once: on a GPU as many as BLOCK_WEIGHTS has room for."""
        return max(1, BLOCK_WEIGHTS // self.codes[0].numel()) if self.heads.is_cuda else 1

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
        cls, config: ModelConfig, layer: int, stored: Mapping[str, StoredTensor], device: torch.device
    ) -> Student:
        """The layer from its payloads, as every reader of the file decodes them.

        `stored` names each tensor of the layer, and the AWQ scale where the file has one.
        """
        names = [spec.name for spec in layer_inventory(config, layer) if spec.role != "expert"]
        scale = awq_scale_name(layer)
        dense = {n: _decoded(stored[n], device) for n in ([*names, scale] if scale in stored else names)}
        experts = {p: _matrices(config, layer, p, stored, device) for p in EXPERT_PROJECTIONS}
        return cls(config, layer, dense, experts)

    def reread(self, stored: Mapping[str, StoredTensor]) -> Student:
        """The layer with some tensors as these payloads give them; the codes in them are those that it has."""
        dense, heads = dict(self.dense), {p: m.heads.clone() for p, m in self.experts.items()}
        for name, tensor in stored.items():
            place = expert_of(name)
            if place is None:
                dense[name] = _decoded(tensor, dense[name].device)
            else:
                _, expert, projection = place
                heads[projection][expert] = _split(tensor, heads[projection].device)[0]
        return self.changed(dense, heads)

    def tensor(self, name: str) -> Tensor:
        """One of `dense`; the reference forward asks for them."""
        return self.dense[name]

    def changed(self, dense: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> Student:
        """The layer with other dense tensors (by name) and other heads (by projection); codes stay."""
        experts = {p: replace(m, heads=heads.get(p, m.heads)) for p, m in self.experts.items()}
        return replace(self, dense={**self.dense, **dense}, experts=experts)

    def forward(self, hidden: Tensor) -> Tensor:
        """The residual stream f32 [sequences, length, hidden] before the layer to the one after it."""
        cfg, prefix = self.config, layer_prefix(self.layer)
        hidden = hidden + attention(self, cfg, self.layer, hidden)
        norm = self.tensor(f"{prefix}post_attention_layernorm.weight")
        t = rms_norm(hidden, norm, cfg.rms_norm_eps).flatten(0, 1)
        return hidden + self._mix(t, route(self, cfg, self.layer, t)).view_as(hidden)

    def _mix(self, t: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of the routed experts' outputs [m, hidden] for normed inputs [m, hidden]."""
        count, (gate, up, down) = routing.ids.shape[1], (self.experts[p] for p in EXPERT_PROJECTIONS)
        placement = Placement.of(routing.ids, self.config.num_local_experts, gate.together())
        scale = self.dense.get(awq_scale_name(self.layer))
        x = spread(gate.enter(t if scale is None else t / scale), placement, count)
        blocks = placement.blocks
        sizes = [len(block.experts) for block in blocks]
        sizes.append(len(placement.order) - sum(sizes))
        parts = [torch.split(permuted(m.heads, placement.order), sizes) for m in (gate, up, down)]
        outputs = []
        for i, rows in enumerate(torch.split(x, [b.rows for b in blocks])):
            experts = blocks[i].experts
            rows = rows.view(len(experts), blocks[i].places, -1)
            g, u = (
                products(rows, parts[j][i], m.codes_of(experts), m.even) for j, m in enumerate((gate, up))
            )
            h = down.enter(F.silu(g) * u)
            outputs.append(products(h, parts[2][i], down.codes_of(experts), down.even).flatten(0, 1))
        mixed = returned(torch.cat(outputs), placement).view(len(t), count, -1)
        return (mixed * routing.weights[..., None]).sum(1)


def _decoded(tensor: StoredTensor, device: torch.device) -> Tensor:
    values = tensor.format.decode(tensor.payload).reshape(-1)[: math.prod(tensor.shape)]
    return torch.from_numpy(values.reshape(tensor.shape)).to(device)


def _rotated_format(tensor: StoredTensor) -> LloydFormat | AffineFormat:
    if not isinstance(tensor.format, LloydFormat | AffineFormat):
        raise TypeError(f"{tensor.format.name} has no codes")
    return tensor.format


def _split(tensor: StoredTensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A matrix's heads f32 [G, n] and its packed codes u8 [G, bytes]."""
    fmt = _rotated_format(tensor)
    raw = torch.from_numpy(fmt.groups(np.require(tensor.payload, requirements="W"))).to(device)
    width, dtype = head_bytes(fmt), torch.float16 if isinstance(fmt, LloydFormat) else torch.float32
    return raw[:, :width].contiguous().view(dtype).float(), raw[:, width:]


def _matrices(
    config: ModelConfig,
    layer: int,
    projection: str,
    stored: Mapping[str, StoredTensor],
    device: torch.device,
) -> Matrices:
    """Read one projection of all experts, unpacked on the device one at a time."""
    tensors = [stored[expert_name(layer, e, projection)] for e in range(config.num_local_experts)]
    fmt, heads, codes = _rotated_format(tensors[0]), [], []
    for tensor in tensors:
        head, packed = _split(tensor, device)
        heads.append(head)
        codes.append(unpacked(packed, fmt.bits))
    return Matrices(fmt, torch.stack(heads), tuple(codes))
