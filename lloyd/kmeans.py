"""Exact one-dimensional k-means of a group of 256, in plain (unweighted) squared error.

Sorted values make clusters intervals, and an interval's cost follows from prefix sums. The cost obeys the quadrangle
inequality, so the best last boundary moves monotonically with the end of the prefix, and each layer of the dynamic
programme is a divide and conquer. Eight rows run in step: each looks at the union of their boundary ranges, which
differ little after the rotation, and no row's result depends on its neighbours. A few Lloyd iterations on the sorted
values give a bound first; prefixes whose own distortion exceeds it in all rows are never continued. Ties go to the
lower boundary. All sums are f64. Depends on vec and numba.

Source: Wu, "Optimal quantization by matrix searching", J. Algorithms 12 (1991), for the monotone boundaries.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .vec import WIDE_LANES, fma, load, splat_wide, store, where_gt

GROUP = 256


@njit(cache=True, nogil=True)
def sort_group(values, keys, spare, counts):
    """Sort f32 values [256] ascending, in place: a radix sort of their order-preserving bits, four passes of eight.

    `keys` and `spare` u32 [256] and `counts` i32 [4, 256] are scratch.
    """
    bits = values.view(np.uint32)
    counts[:] = 0
    for i in range(GROUP):
        b = bits[i]
        key = ~b if b >> np.uint32(31) else b | np.uint32(0x80000000)
        keys[i] = key
        counts[0, key & np.uint32(255)] += 1
        counts[1, (key >> np.uint32(8)) & np.uint32(255)] += 1
        counts[2, (key >> np.uint32(16)) & np.uint32(255)] += 1
        counts[3, key >> np.uint32(24)] += 1
    source, target = keys, spare
    for step in range(4):
        shift = np.uint32(8 * step)
        start = np.int32(0)
        for d in range(256):
            n = counts[step, d]
            counts[step, d] = start
            start += n
        for i in range(GROUP):
            key = source[i]
            digit = (key >> shift) & np.uint32(255)
            target[counts[step, digit]] = key
            counts[step, digit] += 1
        source, target = target, source
    for i in range(GROUP):
        key = keys[i]
        bits[i] = key & np.uint32(0x7FFFFFFF) if key >> np.uint32(31) else ~key


@njit(cache=True, nogil=True)
def prefix_sums(values, sums):
    """sums f64 [257] of values f32 [256] about their mean, which is returned; centring keeps differences exact."""
    mean = 0.0
    for i in range(GROUP):
        mean += np.float64(values[i])
    mean /= GROUP
    sums[0] = 0.0
    for i in range(GROUP):
        sums[i + 1] = sums[i] + (np.float64(values[i]) - mean)
    return mean


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True)
def split_pairs(sums, inverse, bounds, sweeps):
    """Improve bounds i64 [K+1]: each boundary moves to the best place between its neighbours, until nothing moves."""
    count = bounds.shape[0] - 1
    for _ in range(sweeps):
        moved = False
        for k in range(1, count):
            left, right = bounds[k - 1], bounds[k + 1]
            from_left, from_right = sums[left], sums[right]
            best = -1.0
            at = bounds[k]
            for b in range(left + 1, right):
                d = sums[b] - from_left
                e = from_right - sums[b]
                value = d * d * inverse[b - left] + e * e * inverse[right - b]
                if value > best:
                    best = value
                    at = b
            moved = moved or at != bounds[k]
            bounds[k] = at
        if not moved:
            return


@njit(cache=True, nogil=True)
def scan(previous, sums, inverse, end, low, high, gains, starts):
    """Where the last interval of prefix `end` best starts, among low..high, and how much all intervals then explain.

    previous and sums f64 [257, 8]; the results go to starts[end] (as f64) and gains[end]. Returns the least and the
    greatest start over the lanes.
    """
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
    least = starts[end, 0]
    most = least
    for r in range(1, WIDE_LANES):
        least = min(least, starts[end, r])
        most = max(most, starts[end, r])
    return int(least), int(most)


@njit(cache=True, nogil=True)
def within(energy, gains, end, bound):
    """Whether in some lane the distortion of prefix `end` does not exceed the bound f64 [8]."""
    found = False
    for r in range(WIDE_LANES):
        found = found or energy[end, r] - gains[end, r] <= bound[r]
    return found


@njit(cache=True, nogil=True)
def layer(previous, sums, inverse, energy, bound, reach, gains, starts, least, most):
    """One more interval: gains and starts of every prefix that can still win; the longest such prefix is returned.

    `reach` is the longest prefix worth continuing; least and most i64 [257] are scratch.
    """
    last = GROUP - 1
    least[0], most[0] = 0, 0
    starts[0, :] = 0.0
    gains[0, :] = 0.0
    least[last], most[last] = scan(previous, sums, inverse, last, 0, min(last - 1, reach), gains, starts)
    cut = GROUP
    stride = 128
    while stride >= 1:
        for i in range(stride, min(last, cut), 2 * stride):
            upper = min(i + stride, last)
            high = most[upper] if upper < cut else reach
            # A start at or beyond the end would be an empty interval.
            high = min(high, i - 1, reach)
            low = min(least[i - stride], high)
            least[i], most[i] = scan(previous, sums, inverse, i, low, high, gains, starts)
            if not within(energy, gains, i, bound):
                cut = i
                break
        stride //= 2
    if cut < GROUP:
        return cut - 1
    return last


@njit(cache=True, nogil=True)
def exact_bounds(sums, inverse, energy, bound, gains, starts, bounds):
    """Optimal intervals of eight rows' sorted values into bounds i64 [8, K+1].

    sums and energy f64 [257, 8] are running sums of the values and of their squares, both about the mean; bound f64 [8]
    is a distortion that can be reached. gains f64 [2, 257, 8] and starts f64 [K, 257, 8] are scratch.
    """
    count = bounds.shape[1] - 1
    least = np.zeros(GROUP + 1, np.int64)
    most = np.zeros(GROUP + 1, np.int64)
    now, before = gains[0], gains[1]
    before[0, :] = 0.0
    reach = 0
    for i in range(1, GROUP + 1):
        s = load(sums, i)
        store(before, i, s * s * splat_wide(inverse[i]))
        if within(energy, before, i, bound):
            reach = i
    for k in range(1, count - 1):
        reach = layer(before, sums, inverse, energy, bound, reach, now, starts[k], least, most)
        now, before = before, now
    scan(before, sums, inverse, GROUP, 0, min(GROUP - 1, reach), now, starts[count - 1])
    for r in range(WIDE_LANES):
        bounds[r, count] = GROUP
        for k in range(count - 1, 0, -1):
            bounds[r, k] = int(starts[k, bounds[r, k + 1], r])
        bounds[r, 0] = 0


@njit(cache=True, nogil=True)
def gaussian_bounds(count):
    """Where Lloyd iterations start: i64 [K+1], about the intervals that are best for a Gaussian.

    Boundary k lies at the quantile Φ(1.6 · Φ⁻¹(k/K)), here through the logistic approximation, under which that is a
    power of odds.
    """
    bounds = np.empty(count + 1, np.int64)
    bounds[0] = 0
    bounds[count] = GROUP
    for k in range(1, count):
        odds = (k / (count - k)) ** 1.6
        bounds[k] = int(np.floor(GROUP * odds / (1.0 + odds) + 0.5))
    return bounds


@njit(cache=True, nogil=True)
def centroids(values, sums, mean, inverse, bounds, levels):
    """Ascending levels f32 [K]: means of the intervals bounds i64 [K+1]; an empty one repeats its lower neighbour."""
    for k in range(levels.shape[0]):
        n = bounds[k + 1] - bounds[k]
        if n > 0:
            levels[k] = np.float32(mean + (sums[bounds[k + 1]] - sums[bounds[k]]) * inverse[n])
        else:
            levels[k] = levels[k - 1] if k > 0 else values[0]
        if k > 0:
            levels[k] = max(levels[k], levels[k - 1])


@njit(cache=True, nogil=True)
def kmeans_rows(rows, column, exact, levels):
    """Ascending levels f32 [R, K] of the group at `column` of each row of rows f32 [R, K_in].

    `exact` runs the dynamic programme; otherwise the search stops at a partition of which no
    single boundary can be improved, which is nearly as good and cheaper.
    """
    count = levels.shape[1]
    values = np.empty((WIDE_LANES, GROUP), np.float32)
    keys = np.empty(GROUP, np.uint32)
    spare = np.empty(GROUP, np.uint32)
    counts = np.empty((4, 256), np.int32)
    own_sums = np.zeros((WIDE_LANES, GROUP + 1), np.float64)
    means = np.zeros(WIDE_LANES, np.float64)
    inverse = np.zeros(GROUP + 1, np.float64)
    for i in range(1, GROUP + 1):
        inverse[i] = 1.0 / i
    bounds = np.empty((WIDE_LANES, count + 1), np.int64)
    quantiles = gaussian_bounds(count)
    sums = np.zeros((GROUP + 1, WIDE_LANES), np.float64)
    energy = np.zeros((GROUP + 1, WIDE_LANES), np.float64)
    bound = np.zeros(WIDE_LANES, np.float64)
    gains = np.zeros((2, GROUP + 1, WIDE_LANES), np.float64)
    starts = np.zeros((count, GROUP + 1, WIDE_LANES), np.float64)
    for first in range(0, rows.shape[0], WIDE_LANES):
        live = min(WIDE_LANES, rows.shape[0] - first)
        for r in range(WIDE_LANES):
            # Lanes beyond the last row repeat it.
            row = rows[first + min(r, live - 1)]
            values[r] = row[column : column + GROUP]
            sort_group(values[r], keys, spare, counts)
            means[r] = prefix_sums(values[r], own_sums[r])
            bounds[r] = quantiles
            lloyd_bounds(values[r], own_sums[r], means[r], bounds[r], 4)
            split_pairs(own_sums[r], inverse, bounds[r], 4)
        if exact:
            for r in range(WIDE_LANES):
                explained = 0.0
                for k in range(count):
                    d = own_sums[r, bounds[r, k + 1]] - own_sums[r, bounds[r, k]]
                    explained += d * d * inverse[bounds[r, k + 1] - bounds[r, k]]
                for i in range(GROUP):
                    d = np.float64(values[r, i]) - means[r]
                    energy[i + 1, r] = energy[i, r] + d * d
                    sums[i + 1, r] = own_sums[r, i + 1]
                # A little above what rounding of these sums can amount to.
                bound[r] = energy[GROUP, r] - explained + 1e-12 * energy[GROUP, r]
            exact_bounds(sums, inverse, energy, bound, gains, starts, bounds)
        for r in range(live):
            centroids(values[r], own_sums[r], means[r], inverse, bounds[r], levels[first + r])
