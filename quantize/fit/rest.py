"""A model whose experts are the source's, while everything else is as a recipe stores it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...formats.checkpoint.source import Source
from ...formats.hfq.stored import StoredForm
from ...formats.minimax import expert_of
from ...verify.model.reference import TensorWeights, Weights, load
from ..encode.overflow import encode_tensor
from ..spec.recipe import Recipe

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class RestWeights:
    """The model of a source under a recipe, but for its experts. What is read of a layer is kept until `forget`."""

    source: Source
    recipe: Recipe
    _kept: dict[str, F32] = field(default_factory=dict)

    def weight(self, name: str) -> F32:
        """One tensor as a reader of a file gets it, f32 of its shape; of an expert, as the source has it."""
        if expert_of(name) is not None:
            return self.source.weight(name)
        if name not in self._kept:
            self._kept[name] = self._stored(name, self.source.weight(name))
        return self._kept[name]

    def rows(self, name: str, low: int, high: int) -> F32:
        """Rows of a matrix of the vocabulary, f32 [high - low, hidden]."""
        return self._stored(name, self.source.rows(name, low, high))

    def forget(self) -> None:
        """Let go of what was kept."""
        self._kept.clear()

    def _stored(self, name: str, values: F32) -> F32:
        fmt = self.recipe.format_of(name)
        return StoredForm(fmt).decode(encode_tensor(name, values, fmt, self.recipe.fit), values.shape)


@dataclass(frozen=True)
class RestLayer:
    """A layer of such a model on a device, where `experts` has the experts of the source."""

    rest: RestWeights
    experts: Weights | TensorWeights
    device: torch.device

    def tensor(self, name: str) -> Tensor:
        """A tensor f32 in the basis of the checkpoint."""
        given = self.rest if expert_of(name) is None else self.experts
        return load(given, name, torch.empty(0, device=self.device))
