"""The downs of several experts, rounded side by side once their gate and up are."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....awq.row_answers import encode_answering
from ....formats.blocks import Format
from .beside import each
from .rounding import Rounder, Under, unrotated

U8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Down:
    """A w2 f32 [hidden, I], fitted already, and what it is rounded under."""

    weights: Tensor
    under: Under


@dataclass(frozen=True)
class AboveDown:
    """An expert whose w1 and w3 are rounded, and whose `down` is fitted to them; `decided` is what decided that, and
    the Hessian of each projection has `notes`.
    """

    expert: int
    payloads: Mapping[str, U8]
    down: Down
    decided: Hashable
    notes: Mapping[str, Sequence[str]]


def round_downs(
    downs: Sequence[Down],
    fmt: Format,
    gain: float,
    shares: Sequence[tuple[slice, Tensor]] | None,
    rounder: Rounder,
) -> list[U8]:
    """The payload u8 [bytes] of each; its rows answer each other as `shares` of `KeptOnDevice` say, where there are
    any.
    """
    under = [down.under for down in downs]
    scale = torch.stack([u.scale for u in under])[:, None]

    def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
        payloads, values = rounder.encode(rows, fmt, under, gain)
        return payloads, unrotated(values) / scale

    def multiply(share: Tensor, errors: Tensor) -> Tensor:
        return each(
            partial(torch.mm, share), errors, errors.new_empty(len(errors), len(share), errors.shape[2])
        )

    given = torch.stack([down.weights for down in downs])
    return list(rounder.fetch(torch.cat(encode_answering(given, shares, encode, multiply), dim=1)))
