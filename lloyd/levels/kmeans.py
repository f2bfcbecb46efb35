"""Exact one-dimensional k-means of a group of 256, in plain (unweighted) squared error.

Where values are sorted, clusters are intervals, and the cost of an interval follows from prefix sums. The cost obeys
the quadrangle inequality: the best last boundary never moves back when the prefix grows. So each layer of the dynamic
programme divides and conquers. Eight rows run in step: each searches the union of their ranges of boundaries, which
differ little after the rotation, so that no row's result depends on its neighbours. A few Lloyd iterations on the
sorted values give a bound first, and prefixes whose own distortion exceeds it in all eight rows are left out. Of equal
costs the lower boundary wins. All sums are f64.

Source: Wu, "Optimal quantization by matrix searching", J. Algorithms 12 (1991), for the monotone boundaries.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..constants import BOUND_SLACK, GROUP, LLOYD_STEPS, PAIR_SWEEPS, QUANTILE_POWER
from ..loops import compiled
from ..simd.lanes import gather, sort_lanes
from ..simd.vec import (
    LANES,
    WIDE_LANES,
    any_le,
    fma,
    greatest,
    least,
    load,
    load_run,
    load_wide,
    splat_wide,
    store,
    where_eq,
    where_gt,
)


class Search(NamedTuple):
    """What the exact search knows of eight rows' sorted values, the same for every number of intervals.

    sums and energy f64 [257, 8] are running sums of the values and of their squares, both about the mean; inverse f64
    holds 1 / n; bound f64 [1, 8] is a distortion that can be reached. lowest and highest i64 [257] are scratch: the
    least and the greatest start of each prefix's last interval, over the eight rows.
    """

    sums: NDArray[np.float64]
    inverse: NDArray[np.float64]
    energy: NDArray[np.float64]
    bound: NDArray[np.float64]
    lowest: NDArray[np.int64]
    highest: NDArray[np.int64]


@compiled
def prefix_sums(block, half, sums, means):
    """sums f64 [257, 8]: running sums of eight lanes of a block about their means f64 [1, 8].

    About the mean the sums stay small, so that differences of two of them lose few digits.
    """
    total = splat_wide(0.0)
    for i in range(GROUP):
        total = total + load_wide(block, i, half)
    mean = total * splat_wide(1.0 / GROUP)
    store(means, 0, mean)
    total = splat_wide(0.0)
    for i in range(GROUP):
        total = total + (load_wide(block, i, half) - mean)
        store(sums, i + 1, total)


@compiled
def squares(block, half, means, energy):
    """energy f64 [257, 8]: running sums of the squares of eight lanes of a block about their means."""
    mean = load(means, 0)
    total = splat_wide(0.0)
    for i in range(GROUP):
        d = load_wide(block, i, half) - mean
        total = total + d * d
        store(energy, i + 1, total)


@compiled
def lloyd_bounds(values, sums, mean, bounds, iterations):
    """Lloyd iterations on sorted values f32 [256], from the intervals in bounds i64 [K+1] until nothing moves."""
    count = bounds.shape[0] - 1
    for _ in range(iterations):
        moved = False
        for k in range(1, count):
            left = bounds[k] - bounds[k - 1]
            right = bounds[k + 1] - bounds[k]
            if left <= 0 or right <= 0:
                continue
            mid = mean + 0.5 * (
                (sums[bounds[k]] - sums[bounds[k - 1]]) / left
                + (sums[bounds[k + 1]] - sums[bounds[k]]) / right
            )
            b = bounds[k]
            while b > bounds[k - 1] + 1 and values[b - 1] > mid:
                b -= 1
            while b < bounds[k + 1] - 1 and values[b] <= mid:
                b += 1
            moved = moved or b != bounds[k]
            bounds[k] = b
        if not moved:
            return


@compiled
def split_pairs(sums, inverse, falling, bounds, sweeps):
    """Improve bounds i64 [K+1]: each boundary moves to the best place between its neighbours, until nothing moves.

    sums f64 [264] and the others are padded to whole vectors; falling[256 - n] = inverse[n] = 1 / n.
    """
    count = bounds.shape[0] - 1
    steps = np.arange(np.float64(WIDE_LANES))
    lane = load_run(steps, 0)
    nothing = splat_wide(-1.0)
    for _ in range(sweeps):
        moved = False
        for k in range(1, count):
            left, right = bounds[k - 1], bounds[k + 1]
            if right - left < 2:
                continue
            from_left = splat_wide(sums[left])
            from_right = splat_wide(sums[right])
            end = splat_wide(np.float64(right))
            best = nothing
            places = nothing
            for b in range(left + 1, right, WIDE_LANES):
                place = lane + splat_wide(np.float64(b))
                d = load_run(sums, b) - from_left
                e = from_right - load_run(sums, b)
                value = d * d * load_run(inverse, b - left) + e * e * load_run(falling, GROUP - right + b)
                value = where_gt(end, place, value, nothing)
                places = where_gt(value, best, place, places)
                best = where_gt(value, best, value, best)
            at = int(least(where_eq(best, splat_wide(greatest(best)), places, end)))
            moved = moved or at != bounds[k]
            bounds[k] = at
        if not moved:
            return


@compiled
def scan(search, previous, end, low, high, gains, starts):
    """Where the last interval of prefix `end` best starts, among low..high, and how much all intervals then explain.

    previous f64 [257, 8] is what one interval less explains; the results go to starts[end] (as f64) and gains[end].
    Returns the least and the greatest start over the lanes.
    """
    sums, inverse = search.sums, search.inverse
    total = load(sums, end)
    best = splat_wide(-1.0)
    at = splat_wide(np.float64(low))
    for j in range(low, high + 1):
        d = total - load(sums, j)
        value = fma(d * d, splat_wide(inverse[end - j]), load(previous, j))
        at = where_gt(value, best, splat_wide(np.float64(j)), at)
        best = where_gt(value, best, value, best)
    store(gains, end, best)
    store(starts, end, at)
    return int(least(at)), int(greatest(at))


@compiled
def within(search, gains, end):
    """Whether in some lane the distortion of prefix `end` does not exceed the bound."""
    return any_le(load(search.energy, end) - load(gains, end), load(search.bound, 0))


@compiled
def layer(search, previous, reach, first, gains, starts):
    """One more interval: gains and starts of every prefix from `first` on that may still be part of the best partition.

    `reach` is the longest prefix that the layer before left worth continuing; the same for this layer is returned.
    """
    lowest, highest = search.lowest, search.highest
    last = GROUP - 1
    lowest[first], highest[first] = scan(search, previous, first, 0, min(first - 1, reach), gains, starts)
    low = lowest[first]
    lowest[last], highest[last] = scan(search, previous, last, low, min(last - 1, reach), gains, starts)
    cut = GROUP
    stride = GROUP // 2
    while stride >= 1:
        for i in range(stride, min(last, cut), 2 * stride):
            if i <= first:
                continue
            upper = min(i + stride, last)
            high = highest[upper] if upper < cut else reach
            # A start at or beyond the end would be an empty interval.
            high = min(high, i - 1, reach)
            low = min(lowest[max(i - stride, first)], high)
            lowest[i], highest[i] = scan(search, previous, i, low, high, gains, starts)
            if not within(search, gains, i):
                cut = i
                break
        stride //= 2
    if cut < GROUP:
        return cut - 1
    return last


@compiled
def last_start(search):
    """The least start of a last interval whose own distortion does not exceed the bound in all rows."""
    sums, inverse, energy, bound = search.sums, search.inverse, search.energy, search.bound
    whole, total = load(energy, GROUP), load(sums, GROUP)
    for i in range(GROUP - 1):
        d = total - load(sums, i)
        if any_le(whole - load(energy, i) - d * d * splat_wide(inverse[GROUP - i]), load(bound, 0)):
            return i
    return GROUP - 1


@compiled
def exact_bounds(search, gains, starts, bounds):
    """Optimal intervals of eight rows' sorted values into bounds i64 [8, K+1].

    gains f64 [2, 257, 8] and starts f64 [K, 257, 8] are scratch.
    """
    sums, inverse = search.sums, search.inverse
    count = bounds.shape[1] - 1
    now, before = gains[0], gains[1]
    before[0, :] = 0.0
    reach = 0
    for i in range(1, GROUP + 1):
        s = load(sums, i)
        store(before, i, s * s * splat_wide(inverse[i]))
        if within(search, before, i):
            reach = i
    final = last_start(search)
    for k in range(1, count - 1):
        first = max(1, final) if k == count - 2 else 1
        reach = layer(search, before, reach, first, now, starts[k])
        now, before = before, now
    scan(search, before, GROUP, final, min(GROUP - 1, reach), now, starts[count - 1])
    for r in range(WIDE_LANES):
        bounds[r, count] = GROUP
        for k in range(count - 1, 0, -1):
            bounds[r, k] = int(starts[k, bounds[r, k + 1], r])
        bounds[r, 0] = 0


@compiled
def gaussian_bounds(count):
    """Where Lloyd iterations start: i64 [K+1], about the intervals that are best for a Gaussian.

    Boundary k lies at the quantile Φ(1.6 · Φ⁻¹(k/K)), here through the logistic approximation, under which that is a
    power of odds.
    """
    bounds = np.empty(count + 1, np.int64)
    bounds[0] = 0
    bounds[count] = GROUP
    for k in range(1, count):
        odds = (k / (count - k)) ** QUANTILE_POWER
        bounds[k] = int(np.floor(GROUP * odds / (1.0 + odds) + 0.5))
    return bounds


@compiled
def centroids(values, sums, mean, inverse, bounds, levels):
    """Ascending levels f32 [K]: means of the intervals bounds i64 [K+1]; an empty one repeats its lower neighbour."""
    for k in range(levels.shape[0]):
        n = bounds[k + 1] - bounds[k]
        if n > 0:
            levels[k] = np.float32(mean + (sums[bounds[k + 1]] - sums[bounds[k]]) * inverse[n])
        else:
            levels[k] = levels[k - 1] if k > 0 else values[0] + np.float32(0)
        if k > 0:
            levels[k] = max(levels[k], levels[k - 1])


@compiled
def kmeans_rows(rows, column, exact, levels):
    """Ascending levels f32 [R, K] of the group at `column` of each row of rows f32 [R, K_in].

    `exact` runs the dynamic programme. Without it the search ends at a partition of which no single boundary can be
    improved: nearly as good, and cheaper.
    """
    count = levels.shape[1]
    block = np.empty((GROUP, LANES), np.float32)
    values = np.empty((WIDE_LANES, GROUP), np.float32)
    own_sums = np.zeros((WIDE_LANES, GROUP + WIDE_LANES), np.float64)
    means = np.zeros((1, WIDE_LANES), np.float64)
    inverse = np.zeros(GROUP + WIDE_LANES, np.float64)
    falling = np.zeros(GROUP + WIDE_LANES, np.float64)
    for i in range(1, GROUP + 1):
        inverse[i] = 1.0 / i
        falling[GROUP - i] = inverse[i]
    bounds = np.empty((WIDE_LANES, count + 1), np.int64)
    quantiles = gaussian_bounds(count)
    sums = np.zeros((GROUP + 1, WIDE_LANES), np.float64)
    energy = np.zeros((GROUP + 1, WIDE_LANES), np.float64)
    bound = np.zeros((1, WIDE_LANES), np.float64)
    lowest, highest = np.zeros(GROUP + 1, np.int64), np.zeros(GROUP + 1, np.int64)
    search = Search(sums, inverse, energy, bound, lowest, highest)
    gains = np.zeros((2, GROUP + 1, WIDE_LANES), np.float64)
    starts = np.zeros((count, GROUP + 1, WIDE_LANES), np.float64)
    for first in range(0, rows.shape[0], WIDE_LANES):
        live = min(WIDE_LANES, rows.shape[0] - first)
        half = first % LANES // WIDE_LANES
        if half == 0:
            gather(rows, first, column, block)
            sort_lanes(block)
        prefix_sums(block, half, sums, means)
        for r in range(live):
            values[r] = block[:, WIDE_LANES * half + r]
            own_sums[r, : GROUP + 1] = sums[:, r]
            bounds[r] = quantiles
            lloyd_bounds(values[r], own_sums[r], means[0, r], bounds[r], LLOYD_STEPS)
            split_pairs(own_sums[r], inverse, falling, bounds[r], PAIR_SWEEPS)
        if exact:
            squares(block, half, means, energy)
            for r in range(live):
                explained = 0.0
                for k in range(count):
                    d = own_sums[r, bounds[r, k + 1]] - own_sums[r, bounds[r, k]]
                    explained += d * d * inverse[bounds[r, k + 1] - bounds[r, k]]
                bound[0, r] = energy[GROUP, r] - explained + BOUND_SLACK * energy[GROUP, r]
            # Lanes beyond the last row hold zeros, and nothing of them is worth continuing.
            bound[0, live:] = -1.0
            exact_bounds(search, gains, starts, bounds)
        for r in range(live):
            centroids(values[r], own_sums[r], means[0, r], inverse, bounds[r], levels[first + r])
