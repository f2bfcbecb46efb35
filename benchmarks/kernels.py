"""Time of each kernel at the full width of MiniMax-M2.7 and the weight bytes it reads, beside a plain copy.

    python benchmarks/kernels.py [--backend auto|hip|cuda|cpu] [--json]

8 routed experts of 256 for each token, matrices 3072 × 1536: one token, and for experts' products 4 tokens too, each
with its own experts: gate and up, down, and all three with the activation between them (`expert_mlp`). A GPU holds
all 256 experts and every launch routes to others, so that no weight is found in a cache; which ones is written just
before a run, as a router does. The CPU holds as many experts as 4 tokens take. A time is that of one launch, or of
both that `expert_mlp` makes, in a run of them, by the device's clock, the median of several runs; on a GPU runs are
queued behind a long copy, so that the host's own time is not counted. `share` is the bytes of weights per second over
the bytes that a copy of 2 GiB on the same device reads and writes per second; `like` is the same beside copies that
move as many bytes as the kernel, each from another place, in runs as long.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from mq_quant.formats.blocks import BY_NAME
from mq_quant.kernels.forward import ops
from mq_quant.kernels.runtime.host import Backend, open_backend

HIDDEN, INTER, EXPERTS, SLOTS, HEADS, KV_HEADS, HEAD_DIM = 3072, 1536, 256, 8, 48, 8, 128
VOCAB, CONTEXT = 200064, 4096
TOKENS = 4
"""Tokens whose experts are multiplied at once, beside one."""
EXPERT_FORMATS = ("MQ4", "MQ6", "MQ3-Lloyd", "MQ2-Lloyd", "Q8F16")


@dataclass(frozen=True)
class Row:
    kernel: str
    nbytes: int
    seconds: float
    share: float | None = None
    like: float | None = None


class Bench:
    """A back end, how often to repeat, and a long launch to queue behind."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.gpu = backend.name != "cpu"
        self.run, self.runs = (24, 7) if self.gpu else (1, 3)
        size = 1 << 31 if self.gpu else 1 << 27
        self.long = [backend.alloc((size,), np.uint8) for _ in range(2)]
        seconds = self.time(lambda _: backend.copy(*self.long))
        self.copy_rate = 2 * size / seconds
        self.rows = [Row("copy (read + write)", 2 * size, seconds, 1.0)]

    def time(self, work: Callable[[int], object], before: Callable[[], object] = lambda: None) -> float:
        """Seconds of one launch `work(i)`, i counting within a run; `before` each run is not counted."""
        work(0)
        self.backend.synchronize()
        seconds = []
        for _ in range(self.runs):
            for _ in range(3 if self.gpu else 0):
                self.backend.copy(*self.long)
            before()
            first = self.backend.mark()
            for i in range(self.run):
                work(i)
            last = self.backend.mark()
            seconds.append(self.backend.seconds_between(first, last) / self.run)
        return statistics.median(seconds)

    def copy_seconds(self, nbytes: int) -> float:
        """Seconds of a copy that moves `nbytes`, read and written, between other places each time."""
        half = nbytes // 2
        places = [i * half % (self.long[0].size - half) for i in range(self.run)]
        target, source = self.long
        return self.time(
            lambda i: self.backend.copy(
                target.rows(places[i], places[i] + half), source.rows(places[i], places[i] + half)
            )
        )

    def add(
        self,
        kernel: str,
        nbytes: int,
        work: Callable[[int], object],
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """Time `work`, which reads `nbytes` of weights."""
        seconds = self.time(work, before)
        share = nbytes / seconds / self.copy_rate if nbytes else None
        like = self.copy_seconds(nbytes) / seconds if nbytes and self.gpu else None
        self.rows.append(Row(kernel, nbytes, seconds, share, like))


def noise(fmt: str, weights: int, rng: np.random.Generator) -> np.ndarray:
    """A payload of random codes with plain scales and levels: time does not depend on the values."""
    kind = BY_NAME[fmt]
    groups = rng.integers(0, 256, (weights // kind.group, kind.group_bytes), np.uint8)
    if fmt == "Q8F16":
        groups[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    elif fmt.endswith("Lloyd"):
        levels = np.linspace(-1, 1, kind.levels).astype(np.float16)
        groups[:, : 2 * kind.levels] = np.frombuffer(levels.tobytes(), np.uint8)
    else:
        groups[:, :8] = np.frombuffer(np.array([0.01, -0.1], np.float32).tobytes(), np.uint8)
    return groups.reshape(-1)


def dense(bench: Bench, rng: np.random.Generator) -> None:
    b = bench.backend
    for name, rows, cols in (
        ("q_proj", HEADS * HEAD_DIM, HIDDEN),
        ("o_proj", HIDDEN, HEADS * HEAD_DIM),
        ("lm_head", VOCAB, HIDDEN),
    ):
        if name == "lm_head" and not bench.gpu:
            continue
        part = noise("Q8F16", 64 * cols, rng)
        w = ops.matrix(b, np.tile(part, rows // 64), "Q8F16", rows, cols)
        x = b.upload(rng.standard_normal((1, cols)).astype(np.float32))
        out = b.alloc((1, rows), np.float32)
        bench.add(
            f"matvec[Q8F16] {name}", w.data.nbytes, lambda _, w=w, x=x, out=out: ops.matvec(b, w, x, out)
        )


def experts(bench: Bench, fmt: str, rng: np.random.Generator) -> None:
    b = bench.backend
    held = EXPERTS if bench.gpu else SLOTS * TOKENS
    size = BY_NAME[fmt].nbytes(HIDDEN * INTER)
    payload = noise(fmt, HIDDEN * INTER, rng)
    data = b.alloc((3 * held * size,), np.uint8)
    for i in range(3 * held):
        b.write(data, payload, i * size)
    at = np.arange(held, dtype=np.int64) * size
    signs = ops.signs(b)
    w1 = ops.experts(b, data, at, fmt, INTER, HIDDEN)
    w3 = ops.experts(b, data, at + held * size, fmt, INTER, HIDDEN)
    w2 = ops.experts(b, data, at + 2 * held * size, fmt, HIDDEN, INTER)
    for tokens in (1, TOKENS):
        chosen = np.stack([rng.permutation(held)[: tokens * SLOTS] for _ in range(bench.run)])
        routed = b.upload(chosen.reshape(-1, SLOTS).astype(np.int32))
        ids = b.alloc(routed.shape, np.int32)

        def route(ids: ops.Buffer = ids, routed: ops.Buffer = routed) -> None:
            b.copy(ids, routed)

        def of(i: int, ids: ops.Buffer = ids, tokens: int = tokens) -> ops.Buffer:
            return ids.rows(i * tokens, (i + 1) * tokens)

        route()
        x = b.upload(rng.standard_normal((tokens, HIDDEN)).astype(np.float32))
        r = b.upload(rng.standard_normal((tokens, SLOTS, INTER)).astype(np.float32))
        out = b.alloc((tokens, SLOTS, HIDDEN), np.float32)
        told = "" if tokens == 1 else f", {tokens} tokens"
        bench.add(
            f"expert_gate_up[{fmt}]{told}",
            2 * tokens * SLOTS * size,
            lambda i, x=x, of=of: ops.expert_gate_up(b, w1, w3, of(i), x),
            route,
        )
        bench.add(
            f"expert_down[{fmt}]{told}",
            tokens * SLOTS * size,
            lambda i, r=r, out=out, of=of: ops.expert_down(b, w2, of(i), r, out),
            route,
        )
        bench.add(
            f"expert_mlp[{fmt}]{told}",
            3 * tokens * SLOTS * size,
            lambda i, x=x, out=out, of=of: ops.expert_mlp(b, (w1, w3, w2), of(i), x, signs, out=out),
            route,
        )


def small(bench: Bench, rng: np.random.Generator) -> None:
    """The kernels between the matrices; they read activations, and attention its cache."""
    b = bench.backend

    def normal(*shape: int) -> ops.Buffer:
        return b.upload(rng.standard_normal(shape).astype(np.float32))

    x, weight, signs = normal(1, HIDDEN), normal(HIDDEN), ops.signs(b)
    scale = b.upload(np.ones(HIDDEN, np.float32))
    gate, up = normal(1, SLOTS, INTER), normal(1, SLOTS, INTER)
    logits, bias = normal(1, EXPERTS), normal(EXPERTS)
    down, weights, h = normal(1, SLOTS, HIDDEN), normal(1, SLOTS), normal(1, HIDDEN)
    q, position = normal(1, HEADS * HEAD_DIM), b.upload(np.array([CONTEXT - 1], np.int32))
    k, v = normal(CONTEXT, KV_HEADS * HEAD_DIM), normal(CONTEXT, KV_HEADS * HEAD_DIM)
    cos, sin = (b.upload(t) for t in ops.rope_tables(CONTEXT, 64, 5e6))
    cases: tuple[tuple[str, Callable[[int], object]], ...] = (
        ("rmsnorm", lambda _: ops.rmsnorm(b, x, weight, 1e-6)),
        ("rope", lambda _: ops.rope(b, q, cos, sin, position, HEAD_DIM)),
        (f"attention, {CONTEXT} keys", lambda _: ops.attention(b, q, k, v, position, HEAD_DIM)),
        ("router_top_k", lambda _: ops.router_top_k(b, logits, bias, SLOTS)),
        ("scale_rotate", lambda _: ops.scale_rotate(b, x, scale, signs)),
        ("silu_mul_rotate", lambda _: ops.silu_mul_rotate(b, gate, up, signs)),
        ("combine", lambda _: ops.combine(b, h, down, weights)),
        ("add", lambda _: ops.add(b, h, x)),
    )
    for name, work in cases:
        bench.add(name, 0, work)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with open_backend(options.backend) as backend:
        bench = Bench(backend)
        dense(bench, rng)
        for fmt in EXPERT_FORMATS:
            experts(bench, fmt, rng)
        small(bench, rng)
        if options.json:
            print(json.dumps({"device": backend.device, "rows": [asdict(r) for r in bench.rows]}))
            return
        print(backend.device)
        print(f"{'kernel':<36}{'MB':>9}{'ms':>10}{'GB/s':>9}{'share':>7}{'like':>7}")
        for r in bench.rows:
            rate = f"{r.nbytes / r.seconds / 1e9:9.1f}" if r.nbytes else f"{'':>9}"
            shares = "".join(f"{s:7.0%}" for s in (r.share, r.like) if s is not None)
            print(f"{r.kernel:<36}{r.nbytes / 1e6:>9.1f}{r.seconds * 1e3:>10.4f}{rate}{shares}")


if __name__ == "__main__":
    main()
