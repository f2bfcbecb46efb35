"""Launches that begin before the one before them has ended: the same bits as with a wait after every launch."""

from __future__ import annotations

import numpy as np
import pytest
from mq_quant.formats.blocks import BY_NAME
from mq_quant.kernels.forward import ops

LAYERS, EXPERTS, SLOTS, HIDDEN, INTER = 12, 8, 2, 512, 768


@pytest.fixture
def layer(backend, payload, rng):
    """The experts of one layer, up and gate MQ2-Lloyd, down MQ3-Lloyd, and what else a layer needs."""

    def experts(fmt, rows, cols):
        data = backend.upload(payload(fmt, EXPERTS * rows * cols, rng))
        return ops.experts(
            backend, data, np.arange(EXPERTS) * BY_NAME[fmt].nbytes(rows * cols), fmt, rows, cols
        )

    return {
        "w1": experts("MQ2-Lloyd", INTER, HIDDEN),
        "w3": experts("MQ2-Lloyd", INTER, HIDDEN),
        "w2": experts("MQ3-Lloyd", HIDDEN, INTER),
        "logits": [
            backend.upload(rng.standard_normal((1, EXPERTS)).astype(np.float32)) for _ in range(LAYERS)
        ],
        "bias": backend.upload(np.zeros(EXPERTS, np.float32)),
        "scale": backend.upload(np.full(HIDDEN, 4, np.float32)),
        "h": rng.standard_normal((1, HIDDEN)).astype(np.float32),
    }


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "two launches"])
@pytest.mark.parametrize("router_last", [False, True], ids=["ids are old", "ids are of the launch before"])
def test_a_chain_of_layers_needs_no_waiting(backend, layer, router_last, together):
    matrices = layer["w1"], layer["w3"], layer["w2"]

    def run(wait):
        signs, h, seen = ops.signs(backend), backend.upload(layer["h"]), []
        for logits in layer["logits"]:

            def route(logits=logits):
                return ops.router_top_k(backend, logits, layer["bias"], SLOTS)

            routed = None if router_last else route()
            wait()
            x = ops.scale_rotate(backend, h, layer["scale"], signs)
            wait()
            ids, weights = routed or route()
            wait()
            if together:
                y = ops.expert_mlp(backend, matrices, ids, x, signs)
            else:
                gate, up = ops.expert_gate_up(backend, layer["w1"], layer["w3"], ids, x)
                wait()
                r = ops.silu_mul_rotate(backend, gate, up, signs)
                wait()
                y = ops.expert_down(backend, layer["w2"], ids, r)
            wait()
            h = ops.rmsnorm(backend, ops.combine(backend, h, y, weights) or h, layer["scale"], 1e-6)
            wait()
            seen.append((ids, h))
        return [backend.download(b) for pair in seen for b in pair]

    expected = run(backend.synchronize)
    assert all(np.isfinite(a).all() for a in expected)
    assert len({a.tobytes() for a in expected[::2]}) > 1
    for a, b in zip(run(lambda: None), expected, strict=True):
        assert a.tobytes() == b.tobytes()
