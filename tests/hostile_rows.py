"""Groups and importances that break careless encoders, by name: f64, to be rounded to f32."""

from __future__ import annotations

import numpy as np
from lanes_problem import unequal_weights

RANDOM = np.random.default_rng(31)
NORMAL = RANDOM.standard_normal((19, 256))
HOSTILE = {
    "zero": np.zeros((17, 256)),
    "minus zero": np.full((2, 256), -0.0),
    "constant": np.full((3, 256), 0.7),
    "constant, negative and small": np.full((1, 256), -3e-9),
    "two values": np.where(NORMAL > 0, 1.0, -2.0),
    "one of 256": np.where(np.arange(256) == 200, 1.0, 0.0) * np.ones((16, 1)),
    "one huge outlier": np.where(np.arange(256) == 3, 1e6, NORMAL),
    "one outlier beyond reason": np.where(np.arange(256) == 3, -1e25, NORMAL),
    "levels beyond f16": 1e6 * NORMAL,
    "levels far beyond f16": 1e15 * NORMAL,
    "levels at the edge of f16": 3e4 * NORMAL,
    "levels below f16": 1e-9 * NORMAL,
    "subnormal": RANDOM.integers(-9, 10, (5, 256)) * 2.0**-149,
    "subnormal and normal": np.where(np.arange(256) % 2, 2.0**-140, NORMAL),
    "one row": NORMAL[:1],
    "no rows": np.empty((0, 256)),
}
IMPORTANCES = {
    "equal": np.ones(256),
    "unequal": unequal_weights(1.0),
    "with zeros": np.where(np.arange(256) % 3 == 0, 0.0, unequal_weights(0.5)),
    "one channel": np.where(np.arange(256) == 100, 1.0, 0.0),
    "enormous ratio": np.geomspace(1e-30, 1e30, 256),
    "zero": np.zeros(256),
    "not finite": np.where(np.arange(256) == 5, np.inf, 1.0),
}
