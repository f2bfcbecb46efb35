"""Every number that decides the encoder's bytes, in one table.

The compiled loops of this room import it, and the encoder's kernels get it as a header (kernels/encode/geometry.py), so
that CPU and GPU cannot differ. A number's type is part of its meaning: np.float32 where the loops compute in f32, a
Python float where they compute in f64.
"""

from __future__ import annotations

import numpy as np

from ..formats.fwht import GROUP

__all__ = ["GROUP"]

# Rounds of the Hessian fit.
SWEEPS = 8
"""Sweeps over the columns in one round of descent."""
SHAKE = np.float32(0.25)
"""How far warm sweeps shift a target, as a share of the root mean square error of a row's columns under H."""
SHAKE_SEED = 77
"""Seed of the signs by which warm sweeps shift targets up or down."""
INDEPENDENT = (SHAKE, SHAKE, SHAKE, np.float32(0))
"""The shakes of the rounds of descent and refit that follow the first refit, where groups are independent."""
WHOLE = (SHAKE,) * 5
"""The same where every group is fitted again once all are rounded. All are warm: the final codes come after them."""
WHOLE_SWEEPS = 8
"""Sweeps over the columns in one round of those. Five would take a seventh less time, and lose 0.1 to 0.5 % more."""
LONE = tuple(np.float32(0.35 * (1 - n / 12)) for n in range(12))
"""The same where a row is one group under a second moment, and there is nothing to fit again. Shakes that fade find
lower minima than equal ones, and more rounds lower ones yet.
"""
PASSES = 1
"""Passes in which the groups of whole rows are fitted again, with one warm round each; at most the rounds of WHOLE."""
MOST_ENERGY = np.float32(1e38)
"""An error energy of a row beyond this has overflown f32, and shifts nothing."""
SIGNAL_FLOOR = np.float32(0.5)
"""Share of yᵀHy that yᵀHŷ must exceed for a gain other than 1: below it the group carries no signal worth keeping."""

# Refits under a Hessian.
RIDGE = np.float32(1e-3)
"""Share of the mean diagonal that ties each level to its old place; it alone decides a level that no code uses."""
PIVOT_FLOOR = np.float32(0.01)
"""Share of the ridge that every pivot must exceed; else the row keeps its levels."""
POSED_FLOOR = np.float32(1e-4)
"""Share of g00 · g11 that the determinant of a grid's two equations must exceed; else the row keeps its grid."""

# Evenly spaced levels in plain squared error.
BOTH_ENDS = (0.06, 0.14)
"""Shares of the range that the search first cuts off at both ends."""
ONE_END = (0.03, 0.015)
"""Shares by which the search then moves one end at a time, in and out."""
GRID_STEPS = 3
"""Least-squares steps that follow the search."""
DETERMINANT_FLOOR = np.float32(0.5)
"""Determinants of least squares over codes are whole numbers: one that is not beyond this is 0, and the grid stays."""
ROUNDER = np.float32(12582912.0)
"""1.5 · 2²³: adding and subtracting it rounds an f32 to the nearest whole number, ties to even."""
SMALLEST_SCALE = np.float32(2.0**-124)
"""Scales beyond this have a finite reciprocal; a group too narrow for such a scale counts as constant."""
COARSE_SCALE = np.float32(2.0**-20)
"""Scales beyond this share of the largest level keep neighbouring levels well apart in f32."""

# Codebooks in plain squared error.
QUANTILE_POWER = 1.6
"""Lloyd iterations begin at the quantiles Φ(1.6 · Φ⁻¹(k/K)), about where the intervals of a Gaussian are best."""
LLOYD_STEPS = 4
"""Lloyd iterations from there, at most."""
PAIR_SWEEPS = 4
"""Sweeps in which each boundary moves to the best place between its neighbours, at most."""
BOUND_SLACK = 1e-12
"""Share of a row's energy added to the bound of the exact search: more than the rounding of its sums can amount to."""

# The engine's own quantiser.
ENGINE_STEPS = 8
"""Lloyd iterations of the engine, at most."""

# Hessians.
WEIGHT_RANGE = 1e6
"""Largest ratio kept between channel weights of one group; beyond it f32 arithmetic on H would lose the small ones."""
WHITE_RATIO = 2
"""Where the largest channel weight of a group is below this times the smallest, all channels weigh about the same."""
EXTRA_DAMPING = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
"""Shares of the mean diagonal added to a second moment, one after the other, until it can be factored."""

# Stored precision.
F16_MAX = 65504.0
"""The largest finite f16."""
F16_SMALLEST = 2.0**-24
"""The smallest positive f16."""
