"""Targets of whole rows: what answers the errors of earlier groups costs what the Schur complement says."""

from __future__ import annotations

import numpy as np
from lanes_problem import heavy_rows
from mq_quant.lloyd.hessian.row import from_moment
from mq_quant.lloyd.whole_row import answer_errors


def test_an_answered_error_costs_what_the_schur_complement_says() -> None:
    """The best that a later group can do about an error e of the first one leaves eᵀ S e."""
    random, rows = np.random.default_rng(3), heavy_rows(5, 512)
    mix = random.standard_normal((512, 600))
    h = mix @ mix.T / 600 + 0.05 * np.eye(512)
    found, before = from_moment(h.copy()), rows.copy()
    errors = np.zeros((2, 1, 256, 16), np.float32)
    errors[0, 0, :, :5] = random.standard_normal((256, 5))
    targets = np.empty((5, 256), np.float32)
    answer_errors(rows, 0, errors, found.answers[0], targets)
    np.testing.assert_array_equal(targets, rows[:, :256])
    answer_errors(rows, 256, errors, found.answers[1], targets)
    np.testing.assert_array_equal(rows, before)
    e = errors[0, 0, :, :5].T
    whole = np.concatenate([e, rows[:, 256:] - targets], axis=1).astype(np.float64)
    paid = np.einsum("ri,ij,rj->r", whole, h, whole)
    own, cross, rest = h[:256, :256], h[:256, 256:], h[256:, 256:]
    schur = own - cross @ np.linalg.solve(rest, cross.T)
    np.testing.assert_allclose(paid, np.einsum("ri,ij,rj->r", e, schur, e), rtol=1e-3)
