"""How a matrix is stored, applied to one that lies on a device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....formats.hfq.stored import StoredForm
from .transfer import sent

F32 = NDArray[np.float32]


def columns_of(form: StoredForm, width: int, device: torch.device) -> Tensor:
    """What multiplies the columns, f32 [width]."""
    return torch.ones(width, device=device) if form.scale is None else _there(form.scale, device)


def folded(form: StoredForm, weights: Tensor) -> Tensor:
    """A matrix f32 [R, K] with its fold, which divides its rows."""
    return weights if form.fold is None else weights / _there(form.fold, weights.device)[:, None]


def unfolded(form: StoredForm, weights: Tensor) -> Tensor:
    """A matrix f32 [R, K] without its fold."""
    return weights if form.fold is None else weights * _there(form.fold, weights.device)[:, None]


def _there(array: F32, device: torch.device) -> Tensor:
    """A vector on a device, for what this thread asks of it next; nothing waits for the device."""
    return sent(np.ascontiguousarray(array), device)
