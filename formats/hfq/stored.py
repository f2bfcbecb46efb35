"""The stored form of a matrix: how weights of the checkpoint become what a file holds, and how they come back.

An expert's matrix f32 [R, K] goes through four steps: its rows are divided by the fold (w3), its columns are multiplied
by the layer's AWQ scale (w1, w3) or by the fold (w2), each group of 256 columns is rotated, and the format quantises
what comes out. Whoever writes or reads weights of a file takes these steps from here.

A fold holds powers of two that moved from the rows of w3 to the columns of w2; the expert's output stays as it was.
The file does not hold the fold (it would take 24 MB); `recovered_fold` finds it again from the energies of w3's rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..blocks import FORMATS, Format
from ..errors import ConfigError, HfqError, HfqKind, InputError
from ..fwht import rotate, unrotate
from ..minimax import ModelConfig, awq_scale_name, expert_name, expert_of, parse_config
from .container import HfqFile
from .layout import TensorEntry
from .provenance import Provenance

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

_LARGEST_STEP = 16
"""Largest power of two between the folds of two files; a larger ratio of energies is a fault, and stays visible."""


@dataclass(frozen=True)
class StoredForm:
    """How one tensor is stored. `scale` f32 [K] multiplies the columns, `fold` f32 [R] divides the rows; None: ones."""

    format: Format
    scale: F32 | None = None
    fold: F32 | None = None

    def folded(self, weights: F32) -> F32:
        """Weights f32 [R, K] of the checkpoint with their rows divided by the fold, not yet scaled or rotated."""
        return weights if self.fold is None else weights / self.fold[:, None]

    def to_stored(self, weights: F32) -> F32:
        """Weights f32 [R, K] of the checkpoint in the stored basis: folded, scaled and, if the format asks, rotated."""
        out = self.folded(weights)
        if self.scale is not None:
            out = out * self.scale
        return rotate(out) if self.format.rotated else out

    def from_stored(self, values: F32) -> F32:
        """Undo `to_stored` up to f32 rounding: values f32 [R, K] in the basis of the checkpoint.

        `values` is left as it is, and returned itself where there is nothing to undo.
        """
        out = unrotate(values) if self.format.rotated else values
        free = out if self.format.rotated else None  # nobody else holds this array, so it can take the result
        if self.scale is not None:
            out = free = np.divide(out, self.scale, out=free)
        if self.fold is not None:
            out = np.multiply(out, self.fold[:, None], out=free)
        return out

    def decode(self, payload: U8, shape: tuple[int, ...]) -> F32:
        """A whole payload u8 [bytes] as f32 of `shape`, in the basis of the checkpoint."""
        return self.from_stored(self.format.decode(payload).reshape(-1)[: math.prod(shape)].reshape(shape))

    def rows(self, low: int, high: int) -> StoredForm:
        """The form of rows low to high alone."""
        return self if self.fold is None else replace(self, fold=self.fold[low:high])


@dataclass(frozen=True)
class StoredLayer:
    """How the experts of one layer are stored: a format for each projection, and the AWQ scale f16 [hidden] of w1 and
    w3 as the engine reads it (None: ones).

    The fold belongs to one expert; it is given with each question.
    """

    formats: Mapping[str, Format]
    scale: F16 | None = None

    def form(self, projection: str, fold: F32 | None = None) -> StoredForm:
        """The form of one expert's w1, w2 or w3, with that expert's fold f32 [intermediate]."""
        scale = None if self.scale is None else self.scale.astype(np.float32)
        return _form(self.formats[projection], projection, scale, fold)


def _form(fmt: Format, projection: str, scale: F32 | None, fold: F32 | None) -> StoredForm:
    """Which matrix of an expert is scaled and folded by what."""
    if projection == "w2":
        return StoredForm(fmt, scale=fold)
    return StoredForm(fmt, scale, fold if projection == "w3" else None)


def config_of(file: HfqFile) -> ModelConfig:
    """The dimensions that a file states; InputError where it states none, ConfigError where they are none."""
    stated = file.metadata.get("config")
    if not isinstance(stated, Mapping):
        raise InputError("its metadata have no config, so nothing can be said of its model", file=file.path)
    try:
        return parse_config(stated)
    except ConfigError as e:
        hint = e.hint or "the file was made or edited by another program; make it again"
        raise ConfigError(f"its metadata: {e.problem}", file=file.path, hint=hint) from None


def format_of(file: HfqFile, entry: TensorEntry) -> Format:
    """The block format of a tensor; HfqError where its quant_type is unknown."""
    fmt = FORMATS.get(entry.quant_type)
    if fmt is None:
        raise HfqError(
            f"quant_type {entry.quant_type} is unknown",
            kind=HfqKind.UNKNOWN_FORMAT,
            file=file.path,
            tensor=entry.name,
        )
    return fmt


def awq_scale(file: HfqFile, layer: int, width: int) -> F32 | None:
    """The AWQ scale f32 [width] of a layer's w1 and w3, None where the file has none.

    Raises HfqError where the file's scale does not have `width` values.
    """
    name = awq_scale_name(layer)
    if name not in file:
        return None
    entry = file.entry(name)
    if entry.shape != (width,):
        raise HfqError(
            f"has shape {list(entry.shape)}, but the matrices that it scales have {width} columns",
            kind=HfqKind.SCALE,
            file=file.path,
            tensor=name,
        )
    return format_of(file, entry).decode(file.read(name)).reshape(-1)


def stored_form(file: HfqFile, name: str, fold: F32 | None = None) -> StoredForm:
    """How a file stores one tensor, with the expert's fold f32 [intermediate] where one is known.

    Raises HfqError where the format is unknown or the layer's AWQ scale does not fit the matrix.
    """
    entry = file.entry(name)
    fmt = format_of(file, entry)
    place = expert_of(name)
    if place is None:
        return StoredForm(fmt)
    layer, _, projection = place
    scale = None if projection == "w2" else awq_scale(file, layer, entry.shape[-1] if entry.shape else 1)
    return _form(fmt, projection, scale, fold)


def folds_down(file: HfqFile) -> bool:
    """Whether the file's recipe folded a scale of w2 into the rows of w3."""
    recipe = Provenance.of(file).recipe
    return recipe is not None and recipe.folds_down


def recovered_fold(reference: F32, decoded: F32) -> F32:
    """The fold f32 [R] of an expert: powers of two by which the rows of its w3 were divided.

    `reference` f32 [R, K] holds the true rows and `decoded` [R, K] the divided ones, both without the AWQ scale. A
    row's energy shrinks by the square of its power of two; rounding to 2 bits changes it by less than a quarter.
    """
    energy = [np.einsum("rk,rk->r", w, w, dtype=np.float64) for w in (reference, decoded)]
    known = (energy[0] > 0) & (energy[1] > 0) & np.isfinite(energy[0]) & np.isfinite(energy[1])
    ratio = np.divide(energy[0], energy[1], out=np.ones(len(reference)), where=known)
    steps = np.clip(np.rint(np.log2(ratio) / 2), -_LARGEST_STEP, _LARGEST_STEP)
    fold: F32 = np.exp2(steps).astype(np.float32)
    return fold


class RecoveredFolds:
    """The folds of a file's experts against a reference, which is the source or another file of the same model.

    `reference` and `decoded` give the w3 of that name, f32 [intermediate, hidden] in the basis of the checkpoint but
    for the fold. The fold of the expert asked for last is kept, since w2 and w3 follow each other in a file.
    """

    def __init__(self, reference: Callable[[str], F32], decoded: Callable[[str], F32]) -> None:
        self._reference, self._decoded = reference, decoded
        self._last: tuple[str, F32] | None = None

    def of(self, name: str, shape: tuple[int, ...]) -> F32 | None:
        """The fold f32 [intermediate] of the expert whose w2 or w3 of this shape has this name.

        None for any other tensor, and where the expert's matrices do not fit each other.
        """
        place = expert_of(name)
        if place is None or place[2] == "w1":
            return None
        up = expert_name(place[0], place[1], "w3")
        if self._last is None or self._last[0] != up:
            reference, decoded = self._reference(up), self._decoded(up)
            same = reference.ndim == 2 and reference.shape == decoded.shape
            self._last = (up, recovered_fold(reference, decoded) if same else np.empty(0, np.float32))
        fold = self._last[1]
        return fold if fold.size and shape[-1 if place[2] == "w2" else 0] == len(fold) else None
