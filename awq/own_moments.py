"""How far an expert's own second moment is trusted: by the noise in it, told from its tokens alone.

Few tokens make a moment S of K channels that is mostly noise; the layer's moment T over all tokens has little noise,
but it is not the expert's. The best mixture (1 - ρ)·S + ρ·T has ρ = noise / (noise + distance), where noise is the
expected squared error of S and distance the squared distance of the true moment from T. Both are measured in the
coordinates in which T is the identity, because rounding divides by the small eigenvalues of a moment as much as it
multiplies by the large ones. All arithmetic is f64.

Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices" (2004), with T in
place of the identity and with pairs of different tokens in place of the biased square of S.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from ..formats.statistics.row_file import ExpertRows
from .from_moments import CalibratedLayer
from .importance import F64, Importance

FLOOR = 0.01
"""Share of the mean energy that is added to every channel of T before it is whitened, so that its factor exists."""
SAMPLE = 1024
"""Tokens of an expert, evenly spaced, from which its share is estimated: half a million pairs of them."""
CHUNK = 4096
"""Rows whose products are summed in f32."""


@dataclass(frozen=True)
class Whitening:
    """The coordinates in which the layer's moment T f64 [K, K] is about the identity.

    `lower` f64 [K, K] is the Cholesky factor of T with its floor; `target` f64 [K, K] is T in these coordinates.
    """

    lower: F64
    target: F64

    def of(self, rows: NDArray[np.float32]) -> F64:
        """Rows f32 [n, K] in these coordinates, f64 [n, K]."""
        out: F64 = solve_triangular(self.lower, rows.T.astype(np.float64), lower=True).T
        return out


def whitening(moment: F64) -> Whitening | None:
    """The whitening of a layer's moment f64 [K, K]; None where the moment has no energy or is not finite."""
    mean = float(np.trace(moment)) / len(moment)
    if not (np.isfinite(moment).all() and mean > 0):
        return None
    floored = moment.copy()
    floored[np.diag_indices_from(floored)] += FLOOR * mean
    try:
        lower = np.linalg.cholesky(floored)
    except np.linalg.LinAlgError:
        return None
    half = solve_triangular(lower, moment, lower=True)
    return Whitening(np.asarray(lower, np.float64), solve_triangular(lower, half.T, lower=True))


def layer_share(rows: NDArray[np.float32], layer: Whitening) -> float:
    """ρ, the layer's share in the moment of an expert that saw these rows f32 [n, K]: 1 where n is below 2."""
    count = len(rows)
    if count < 2:
        return 1.0
    step = -(-count // SAMPLE)
    x = layer.of(rows[::step])
    energy = np.einsum("nk,nk->n", x, x)
    pairs = x @ x.T
    seen = len(x)
    own = float(np.square(pairs).sum() - np.square(energy).sum()) / max(seen * (seen - 1), 1)
    cross = float(np.einsum("nk,nk->", x @ layer.target, x)) / seen
    noise = max(float(np.square(energy).mean()) - own, 0.0) / count
    distance = max(own - 2 * cross + float(np.square(layer.target).sum()), 0.0)
    return noise / (noise + distance) if noise + distance > 0 else 1.0


def own_moment(rows: NDArray[np.float32]) -> F64:
    """E[x xᵀ] f64 [K, K] over rows f32 [n, K], exactly symmetric; sums of 4096 rows are f32, sums of those f64."""
    width = rows.shape[1]
    total = np.zeros((width, width))
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        total += part.T @ part
    out: F64 = (np.triu(total) + np.triu(total, 1).T) / max(len(rows), 1)
    return out


def mixed(rows: NDArray[np.float32], prior: Importance, white: Whitening | None) -> Importance:
    """The importance of one expert's matrix from the rows f32 [n, K] that it saw, drawn toward a prior with a moment.

    `white` is the whitening of the prior's moment.
    """
    assert prior.moment is not None
    share = 1.0 if white is None else layer_share(rows, white)
    moment = prior.moment if share == 1.0 else (1 - share) * own_moment(rows) + share * prior.moment
    return Importance(np.diag(moment).copy(), moment, float(len(rows)))


@dataclass(frozen=True)
class WithRows:
    """One layer as a calibration gathers it, whose experts' inputs were kept besides: what it says without looking at
    these is what `gathered` says.
    """

    gathered: CalibratedLayer

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

    def inputs(self, expert: int) -> NDArray[np.float32]:
        """The rows f32 [n, hidden] that one expert's gate and up see."""
        return self.kept.of(expert)

    def from_rows(self, expert: int, projection: str, rows: NDArray[np.float32]) -> Importance:
        """The importance of one matrix whose inputs are these rows f32 [n, K]."""
        prior = self.of(expert, projection)
        if projection != "w2":
            return mixed(rows, prior, self.gate_up)
        assert prior.moment is not None
        own_prior = prior.moment is not self.gathered.down_pooled
        return mixed(rows, prior, whitening(prior.moment) if own_prior else self.down)


def with_rows(gathered: CalibratedLayer, kept: ExpertRows) -> OwnMoments:
    """The importances of a layer from what all its experts share and from what each of them saw."""
    assert gathered.gate_up.moment is not None
    return OwnMoments(gathered, kept, whitening(gathered.gate_up.moment), whitening(gathered.down_pooled))
