"""How far an expert's own second moment is trusted: by the noise in it, told from its tokens alone.

Few tokens make a moment S of K channels that is mostly noise; the layer's moment T over all tokens has little noise,
but it is not the expert's. The best mixture (1 - ρ)·S + ρ·T has ρ = noise / (noise + distance), where noise is the
expected squared error of S and distance the squared distance of the true moment from T. Both are measured in the
coordinates in which T is the identity, because rounding divides by the small eigenvalues of a moment as much as it
multiplies by the large ones. Moments are f64, rows and their products f32.

Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices" (2004), with T in
place of the identity and with pairs of different tokens in place of the biased square of S.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..formats.jit import compiler
from ..formats.lapack import add_pairs, add_products, cholesky, divide, invert_lower
from ..formats.statistics.row_file import ExpertRows
from .from_moments import CalibratedLayer
from .importance import F64, Importance, square
from .row_answers import RowAnswers

F32 = NDArray[np.float32]
Sums = F32 | F64
"""Σ x xᵀ [K, K] in the lower triangle, zeros above it."""
compiled = compiler(Path(__file__))

FLOOR = 0.01
"""Share of the mean energy that is added to every channel of T before it is whitened, so that its factor exists."""
SAMPLE = 1024
"""Tokens of an expert, evenly spaced, from which its share is estimated: half a million pairs of them."""
CHUNK = 4096
"""Rows whose products are summed in f32."""
TILE = 8
"""Rows and columns that `blend` takes at a time: rows of a wide matrix share so few sets of the innermost cache that no
more would stay there."""


@dataclass(frozen=True)
class Whitening:
    """The coordinates in which the layer's moment T f64 [K, K] is about the identity: rows x are L⁻¹ · x.

    `lower` f32 [K, K] is L, the Cholesky factor of T + `floor` · I, so that T is I - floor · L⁻¹ · L⁻ᵀ there; `energy`
    is the sum of that matrix's squares.
    """

    lower: F32
    floor: float
    energy: float


def whitening(moment: F64) -> Whitening | None:
    """The whitening of a layer's moment f64 [K, K]; None where the moment has no energy or is not finite."""
    mean = float(np.trace(moment)) / len(moment)
    if not (np.isfinite(moment).all() and mean > 0):
        return None
    floor = FLOOR * mean
    factor = moment.copy()
    factor[np.diag_indices_from(factor)] += floor
    if not cholesky(factor):
        return None
    lower = factor.astype(np.float32)
    if not invert_lower(factor):
        return None
    inverse = np.tril(factor)
    outer = floor * (inverse @ inverse.T)
    energy = len(moment) - 2 * float(np.trace(outer)) + float(np.vdot(outer, outer))
    return Whitening(lower, floor, energy)


def layer_share(rows: F32, layer: Whitening) -> float:
    """ρ, the layer's share in the moment of an expert that saw these rows f32 [n, K]: 1 where n is below 2."""
    count = len(rows)
    if count < 2:
        return 1.0
    x = rows[:: -(-count // SAMPLE)].copy()
    divide(x, layer.lower)
    seen, products = len(x), np.zeros((len(x), len(x)), np.float32)
    add_pairs(x, products)
    energy = np.diag(products).astype(np.float64)
    np.square(products, out=products)
    pairs = 2 * (products.sum(dtype=np.float64) - np.square(energy).sum())
    own = float(pairs) / max(seen * (seen - 1), 1)
    divide(x, layer.lower, transposed=True)
    np.square(x, out=x)
    cross = (float(energy.sum()) - layer.floor * float(x.sum(dtype=np.float64))) / seen
    noise = max(float(np.square(energy).mean()) - own, 0.0) / count
    distance = max(own - 2 * cross + layer.energy, 0.0)
    return noise / (noise + distance) if noise + distance > 0 else 1.0


def pieces(rows: F32, kept: NDArray[np.bool_] | None = None) -> Iterator[F32]:
    """Rows f32 [n, K], CHUNK of them at a time, and of these the `kept` ones; one piece at least."""
    for start in range(0, max(len(rows), 1), CHUNK):
        piece = rows[start : start + CHUNK]
        yield np.ascontiguousarray(piece if kept is None else piece[kept[start : start + CHUNK]])


def summed(rows: F32, kept: NDArray[np.bool_] | None = None) -> Sums:
    """Σ x xᵀ [K, K] over the `kept` ones of rows f32 [n, K]. Sums of a piece are f32, sums of several pieces f64."""
    wide: Sums | None = None
    for piece in pieces(rows, kept):
        part = np.zeros((rows.shape[1],) * 2, np.float32)
        add_products(piece, part)
        wide = part if wide is None else wide + part.astype(np.float64)
    assert wide is not None
    return wide


def own_moment(rows: F32) -> F64:
    """E[x xᵀ] f64 [K, K] over rows f32 [n, K], exactly symmetric."""
    return blended(summed(rows), len(rows), np.zeros((rows.shape[1],) * 2), 0.0)


def blended(sums: Sums, count: int, prior: F64, share: float, room: F64 | None = None) -> F64:
    """(1 - share) · E[x xᵀ] + share · prior, f64 [K, K], exactly symmetric as `prior`, of the sums of `count` rows; in
    `room`, where there is one.
    """
    out = square(len(prior), room)
    blend(sums, (1 - share) / max(count, 1), prior, share, out)
    return out


@compiled
def blend(sums, own, prior, share, out):  # type: ignore[no-untyped-def]
    """out = own · sums + share · prior, all [K, K]; of sums the lower triangle counts, and prior is symmetric."""
    for top in range(0, len(out), TILE):
        for left in range(0, top + TILE, TILE):
            for i in range(top, min(top + TILE, len(out))):
                for j in range(left, min(left + TILE, i + 1)):
                    out[i, j] = own * sums[i, j] + share * prior[i, j]
            for j in range(left, min(left + TILE, len(out))):
                for i in range(max(top, j + 1), min(top + TILE, len(out))):
                    out[j, i] = out[i, j]


def mixed(
    rows: F32, prior: Importance, white: Whitening | None, sums: Sums | None = None, room: F64 | None = None
) -> Importance:
    """The importance of one expert's matrix from the rows f32 [n, K] that it saw, drawn toward a prior with a moment.

    `white` is the whitening of the prior's moment; `sums` are those of `rows`, where they are known; a moment of its
    own lies in `room`, where there is one.
    """
    assert prior.moment is not None
    share, moment = 1.0 if white is None else layer_share(rows, white), prior.moment
    if share < 1:
        moment = blended(summed(rows) if sums is None else sums, len(rows), prior.moment, share, room)
    return Importance(np.diag(moment).copy(), moment, float(len(rows)))


@dataclass(frozen=True)
class WithRows:
    """One layer as a calibration gathers it, whose experts' inputs were kept besides: what it says without looking at
    these is what `gathered` says. `answers` says how rows of down answer each other, None where they do not.
    """

    gathered: CalibratedLayer
    answers: RowAnswers | None

    @property
    def layer(self) -> int:
        """The layer's number."""
        return self.gathered.layer

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what could not be used and was replaced."""
        return self.gathered.notes

    @property
    def shared(self) -> Importance:
        """The layer's importance at gate and up, toward which experts of few tokens are drawn."""
        return self.gathered.gate_up

    def of(self, expert: int, projection: str) -> Importance:
        """The importance of one matrix as far as it is known without its expert's rows: that of the layer."""
        return self.gathered.of(expert, projection)

    def gate_up_energy(self) -> F64:
        """Σ over experts of the summed squares at gate and up, f64 [hidden]."""
        return self.gathered.gate_up_energy()


@dataclass(frozen=True)
class OwnMoments(WithRows):
    """One layer whose experts' inputs were kept, so that each has moments of its own. For any number of threads.

    `gathered` is the layer as a calibration gathers it, `kept` the inputs of its experts. `gate_up` and `down` are the
    whitenings of the moments that all experts share.
    """

    kept: ExpertRows
    gate_up: Whitening | None
    down: Whitening | None

    def inputs(self, expert: int) -> F32:
        """The rows f32 [n, hidden] that one expert's gate and up see."""
        return self.kept.of(expert)

    def from_rows(
        self, expert: int, projection: str, rows: F32, sums: Sums | None = None, room: F64 | None = None
    ) -> Importance:
        """The importance of one matrix whose inputs are these rows f32 [n, K]; `sums` and `room` as in `mixed`."""
        prior = self.of(expert, projection)
        if projection != "w2":
            return mixed(rows, prior, self.gate_up, sums, room)
        assert prior.moment is not None
        own_prior = prior.moment is not self.gathered.down_pooled
        return mixed(rows, prior, whitening(prior.moment) if own_prior else self.down, sums, room)


def with_rows(gathered: CalibratedLayer, kept: ExpertRows, answers: RowAnswers | None = None) -> OwnMoments:
    """The importances of a layer from what all its experts share and from what each of them saw."""
    assert gathered.gate_up.moment is not None
    white = whitening(gathered.gate_up.moment)
    return OwnMoments(gathered, answers, kept, white, whitening(gathered.down_pooled))
