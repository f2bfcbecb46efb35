"""The downs of several experts, rounded side by side once their gate and up are."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....formats.blocks import Format
from .rounding import Answers, Rounder, Under

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
    answers: Answers | None,
    rounder: Rounder,
) -> list[U8]:
    """The payload u8 [bytes] of each; its rows answer each other where it is known how."""
    weights = torch.stack([down.weights for down in downs])
    return list(rounder.fetch(rounder.payloads(weights, fmt, [down.under for down in downs], gain, answers)))
