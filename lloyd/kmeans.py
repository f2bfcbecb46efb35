"""Exact one-dimensional k-means of a group of 256, in plain (unweighted) squared error.

Sorted values make clusters intervals, and an interval's cost follows from prefix sums. The cost obeys the quadrangle inequality, so
the best last boundary moves monotonically with the end of the prefix: each layer of the dynamic programme is a divide and conquer.
A few Lloyd iterations on the sorted values give a bound first, and a prefix whose own distortion exceeds it is never continued: layers shrink to the
prefixes that can still win. Ties go to the lower boundary, so the result is unique. Depends on numba.

Source: Wu, "Optimal quantization by matrix searching", J. Algorithms 12 (1991), for the monotone boundaries.
"""

from __future__ import annotations

import numpy as np
from numba import njit

GROUP = 256


@njit(cache=True, nogil=True)  # type: ignore[misc]
def sort_group(values, keys, spare, counts):  # type: ignore[no-untyped-def]
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


@njit(cache=True, nogil=True)  # type: ignore[misc]
def prefix_sums(values, sums):  # type: ignore[no-untyped-def]
    """sums f64 [257] of values f32 [256] about their mean, which is returned; centring keeps the differences exact enough."""
    mean = 0.0
    for i in range(GROUP):
        mean += np.float64(values[i])
    mean /= GROUP
    sums[0] = 0.0
    for i in range(GROUP):
        sums[i + 1] = sums[i] + (np.float64(values[i]) - mean)
    return mean


@njit(cache=True, nogil=True)  # type: ignore[misc]
def lloyd_bounds(values, sums, mean, bounds, iterations):  # type: ignore[no-untyped-def]
    """Lloyd iterations on sorted values [256]: bounds i64 [K+1] holds the intervals, quantiles at first; stops when nothing moves."""
    count = bounds.shape[0] - 1
    for _ in range(iterations):
        moved = False
        for k in range(1, count):
            left = bounds[k] - bounds[k - 1]
            right = bounds[k + 1] - bounds[k]
            if left <= 0 or right <= 0:
                continue
            mid = mean + 0.5 * (
                (sums[bounds[k]] - sums[bounds[k - 1]]) / left + (sums[bounds[k + 1]] - sums[bounds[k]]) / right
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


@njit(cache=True, nogil=True)  # type: ignore[misc]
def scan(previous, sums, inverse, end, low, high):  # type: ignore[no-untyped-def]
    """The start j in low..high of the last interval of prefix `end` that explains most, and how much all intervals explain."""
    best = -1.0
    at = low
    total = sums[end]
    for j in range(low, high + 1):
        d = total - sums[j]
        value = previous[j] + d * d * inverse[end - j]
        if value > best:
            best = value
            at = j
    return at, best


@njit(cache=True, nogil=True)  # type: ignore[misc]
def exact_bounds(values, sums, mean, inverse, gains, starts, energy, bounds):  # type: ignore[no-untyped-def]
    """Optimal intervals of sorted values [256] into bounds i64 [K+1].

    gains f64 [2, 257], starts i64 [K, 257] and energy f64 [257] are scratch; inverse f64 [257] holds 1/n.
    """
    count = bounds.shape[0] - 1
    for k in range(count + 1):
        bounds[k] = k * GROUP // count
    lloyd_bounds(values, sums, mean, bounds, 40)
    energy[0] = 0.0
    for i in range(GROUP):
        d = np.float64(values[i]) - mean
        energy[i + 1] = energy[i] + d * d
    explained = 0.0
    for k in range(count):
        d = sums[bounds[k + 1]] - sums[bounds[k]]
        explained += d * d * inverse[bounds[k + 1] - bounds[k]]
    bound = (energy[GROUP] - explained) * (1.0 + 1e-9) + 1e-300
    now, before = gains[0], gains[1]
    reach = 0
    before[0] = 0.0
    for i in range(1, GROUP + 1):
        before[i] = sums[i] * sums[i] * inverse[i]
        starts[0, i] = 0
        if energy[i] - before[i] <= bound:
            reach = i
    for k in range(1, count - 1):
        # Prefixes of fewer than k+1 values have an empty interval; they keep what k intervals explain.
        now[0] = 0.0
        starts[k, 0] = 0
        limit = GROUP - 1
        at, best = scan(before, sums, inverse, GROUP - 1, 0, min(GROUP - 2, reach))
        starts[k, limit] = at
        now[limit] = best
        starts[k, GROUP] = at
        stride = 128
        cut = GROUP
        while stride >= 1:
            for i in range(stride, min(GROUP - 1, cut), 2 * stride):
                low = starts[k, i - stride]
                upper = i + stride
                if upper > GROUP - 1:
                    upper = GROUP - 1
                high = starts[k, upper] if upper < cut else reach
                at, best = scan(before, sums, inverse, i, low, min(high, i - 1, reach))
                starts[k, i] = at
                now[i] = best
                if energy[i] - best > bound:
                    cut = i
                    break
            stride //= 2
        reach = min(cut, GROUP) - 1
        now, before = before, now
    at, best = scan(before, sums, inverse, GROUP, 0, min(GROUP - 1, reach))
    bounds[count] = GROUP
    bounds[count - 1] = at
    for k in range(count - 2, 0, -1):
        bounds[k] = starts[k, bounds[k + 1]]
    bounds[0] = 0


@njit(cache=True, nogil=True)  # type: ignore[misc]
def kmeans_rows(rows, column, exact, levels):  # type: ignore[no-untyped-def]
    """Ascending levels f32 [R, K] of the group at `column` of each row of rows f32 [R, K_in].

    `exact` runs the dynamic programme; otherwise Lloyd iterations from quantiles, which is nearly as good and cheaper.
    """
    count = levels.shape[1]
    values = np.empty(GROUP, np.float32)
    keys = np.empty(GROUP, np.uint32)
    spare = np.empty(GROUP, np.uint32)
    counts = np.empty((4, 256), np.int32)
    sums = np.empty(GROUP + 1, np.float64)
    inverse = np.zeros(GROUP + 1, np.float64)
    for i in range(1, GROUP + 1):
        inverse[i] = 1.0 / i
    gains = np.zeros((2, GROUP + 1), np.float64)
    starts = np.zeros((count, GROUP + 1), np.int64)
    energy = np.empty(GROUP + 1, np.float64)
    bounds = np.empty(count + 1, np.int64)
    for r in range(rows.shape[0]):
        values[:] = rows[r, column : column + GROUP]
        sort_group(values, keys, spare, counts)
        mean = prefix_sums(values, sums)
        if exact:
            exact_bounds(values, sums, mean, inverse, gains, starts, energy, bounds)
        else:
            for k in range(count + 1):
                bounds[k] = k * GROUP // count
            lloyd_bounds(values, sums, mean, bounds, 8)
        for k in range(count):
            n = bounds[k + 1] - bounds[k]
            if n > 0:
                levels[r, k] = np.float32(mean + (sums[bounds[k + 1]] - sums[bounds[k]]) * inverse[n])
            else:
                levels[r, k] = levels[r, k - 1] if k > 0 else values[0]
        for k in range(1, count):
            levels[r, k] = max(levels[r, k], levels[r, k - 1])
