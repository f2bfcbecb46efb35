"""A residual stream of which some sequences are asked for at a time, again and again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..encode.on_device.transfer import sent

F32 = NDArray[np.float32]

SHARE = 0.25
"""The largest share of a GPU's free memory that one stream may take there."""


@dataclass(frozen=True)
class Stream:
    """A stream f32 [sequences, length, hidden]; it lies on the device where a GPU has room for it, else in `array`,
    which may be a mapped file.
    """

    array: F32
    device: torch.device
    there: Tensor | None

    @classmethod
    def on(cls, device: torch.device, array: F32) -> Stream:
        """A stream of which a device is to see sequences."""
        if device.type == "cpu" or array.nbytes > SHARE * torch.cuda.mem_get_info(device)[0]:
            return cls(array, device, None)
        return cls(array, device, sent(array, device))

    def of(self, chosen: NDArray[np.int64]) -> Tensor:
        """The chosen sequences on the device, f32 [chosen, length, hidden]."""
        if self.there is not None:
            return self.there[torch.from_numpy(chosen).to(self.device)]
        return torch.from_numpy(np.asarray(self.array[chosen], np.float32)).to(self.device)
