"""The forward pass of an HFQ file through the kernels: the arithmetic that the engine does, on any back end.

Weights are read from the file one layer at a time, and only those experts to which tokens are routed. A file of at most
RESIDENT_BYTES stays loaded. Hidden states are f32 buffers [T, H], one for each sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.blocks import FORMATS
from ...formats.errors import CheckError
from ...formats.hfq import HfqFile
from ...formats.hfq.stored import awq_scale, format_of
from ...formats.minimax import ModelConfig, awq_scale_name, expert_name, layer_prefix
from ...formats.watch import UNWATCHED, Watch
from ...kernels.forward import ops
from ...kernels.runtime.host import Backend, Buffer
from .hfq_weights import DecodedFile, check_shapes, pieces

RESIDENT_BYTES = 1 << 30
"""The layers of a file of at most this size stay loaded once they were read."""


@dataclass(frozen=True)
class Dense:
    """The weights of a layer that every token uses: norms, attention, router and the AWQ scale f32 [H]."""

    norms: dict[str, Buffer]
    matrices: dict[str, ops.Matrix]
    router: ops.Matrix
    bias: Buffer
    scale: Buffer


@dataclass
class Cache:
    """Keys and values of one layer and sequence, f32 [capacity, kv_dim]."""

    k: Buffer
    v: Buffer


@dataclass
class Traffic:
    """Bytes of weights: how many were read from the file, how many are loaded, and how many were at most."""

    read: int = 0
    loaded: int = 0
    peak: int = 0

    def take(self, nbytes: int) -> None:
        self.read += nbytes
        self.loaded += nbytes
        self.peak = max(self.peak, self.loaded)


Expert = dict[str, ops.Experts]
FORMATS_ROTATED = {fmt.name: fmt.rotated for fmt in FORMATS.values()}
"""Whether the inputs of a matrix in this format are rotated."""
Stopwatch = Callable[[str], None]


@dataclass
class KernelModel:
    """An open file on a back end; `capacity` is the number of positions that a sequence may have.

    `after` is called with a stage's name when its launches are queued; benchmarks wait there and read the clock.
    Raises CheckError where a layer's experts have different formats or shapes, or its hidden states are not numbers,
    and HfqError where a tensor is missing or has another shape than the config calls for.
    """

    file: HfqFile
    cfg: ModelConfig
    backend: Backend
    capacity: int
    after: Stopwatch = field(default=lambda stage: None)
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        check_shapes(self.file, self.cfg)
        cos, sin = ops.rope_tables(self.capacity, self.cfg.rotary_dim, self.cfg.rope_theta)
        self._cos, self._sin = self.backend.upload(cos), self.backend.upload(sin)
        self._signs = ops.signs(self.backend)
        self._weights = DecodedFile(self.file)
        self._keep = sum(entry.nbytes for entry in self.file.entries) <= RESIDENT_BYTES
        self._dense: dict[int, Dense] = {}
        self._experts: dict[int, tuple[frozenset[int], Expert]] = {}
        self._ends: dict[str, Any] = {}

    # --- weights ---------------------------------------------------------------------------------------------------

    def _matrix(self, name: str) -> ops.Matrix:
        entry = self.file.entry(name)
        data, at = self.backend.alloc((entry.nbytes,), np.uint8), 0
        for piece in pieces(self.file, entry):
            self.backend.write(data, piece, at)
            at += piece.size
        self.traffic.take(entry.nbytes)
        return ops.Matrix(data, format_of(self.file, entry).name, entry.shape[0], entry.shape[1])

    def _vector(self, name: str) -> Buffer:
        self.traffic.take(self.file.entry(name).nbytes)
        return self.backend.upload(self._weights.stored(name))

    def _forget(self, layer: int) -> None:
        """Drop the other layers from memory, unless the whole file stays loaded."""
        if not self._keep and layer not in self._dense:
            self._dense, self._experts = {}, {}
            self.traffic.loaded = 0

    def dense(self, layer: int) -> Dense:
        """The dense weights of a layer; other layers are dropped from memory, unless the whole file stays loaded."""
        self._forget(layer)
        if layer not in self._dense:
            p = layer_prefix(layer)
            norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
            scale = awq_scale(self.file, layer, self.cfg.hidden_size)
            if scale is None:
                scale = np.ones(self.cfg.hidden_size, np.float32)
            else:
                self.traffic.take(self.file.entry(awq_scale_name(layer)).nbytes)
            self._dense[layer] = Dense(
                {name: self._vector(f"{p}{name}.weight") for name in norms},
                {name: self._matrix(f"{p}self_attn.{name}_proj.weight") for name in "qkvo"},
                self._matrix(f"{p}block_sparse_moe.gate.weight"),
                self._vector(f"{p}block_sparse_moe.e_score_correction_bias"),
                self.backend.upload(scale),
            )
        return self._dense[layer]

    def experts(self, layer: int, ids: Sequence[int]) -> Expert:
        """The three projections of a layer, with the experts `ids` loaded besides those that are loaded already."""
        wanted = frozenset(ids)
        held = self._experts.get(layer)
        if held is None or not wanted <= held[0]:
            if held is not None:
                wanted |= held[0]
                del self._experts[layer], held
            self._experts[layer] = (
                wanted,
                {p: self._projection(layer, p, sorted(wanted)) for p in ("w1", "w3", "w2")},
            )
        return self._experts[layer][1]

    def _projection(self, layer: int, projection: str, ids: Sequence[int]) -> ops.Experts:
        entries = [self.file.entry(expert_name(layer, e, projection)) for e in ids]
        first = entries[0]
        for entry in entries:
            if (entry.quant_type, entry.shape) != (first.quant_type, first.shape):
                raise CheckError(
                    "has another format or shape than its layer's first expert", tensor=entry.name
                )
        stride = -(-first.nbytes // 8) * 8
        data = self.backend.alloc((stride * len(ids),), np.uint8)
        offsets = np.full(self.cfg.num_local_experts, -1, np.int64)
        for i, (e, entry) in enumerate(zip(ids, entries, strict=True)):
            offsets[e] = i * stride
            self.backend.write(data, self.file.read(entry.name), i * stride)
            self.traffic.take(entry.nbytes)
        return ops.experts(self.backend, data, offsets, FORMATS[first.quant_type].name, *first.shape)

    def _end(self, name: str, load: Callable[[], Any]) -> Any:
        """The final norm or lm_head, which stays loaded where the whole file does."""
        if name in self._ends:
            return self._ends[name]
        loaded = load()
        if self._keep:
            self._ends[name] = loaded
        return loaded

    # --- the model -------------------------------------------------------------------------------------------------

    def embed(self, tokens: NDArray[np.integer]) -> Buffer:
        """Token ids [T] to hidden states f32 [T, H]; only their rows of the table are read."""
        entry = self.file.entry("model.embed_tokens.weight")
        ids, places = np.unique(np.asarray(tokens, np.int64), return_inverse=True)
        row = entry.nbytes // entry.shape[0]
        payload = np.concatenate([self.file.read_range(entry, i * row, (i + 1) * row) for i in ids.tolist()])
        self.traffic.read += payload.nbytes
        table = ops.matrix(self.backend, payload, format_of(self.file, entry).name, len(ids), entry.shape[1])
        out = ops.embed(self.backend, table, self.backend.upload(places.astype(np.int32)))
        self.after("embed")
        return out

    def cache(self) -> Cache:
        """An empty cache of one layer and sequence."""
        shape = (self.capacity, self.cfg.kv_dim)
        return Cache(self.backend.alloc(shape, np.float32), self.backend.alloc(shape, np.float32))

    def positions(self, start: int, count: int) -> Buffer:
        """The positions start to start + count, i32 [count]."""
        return self.backend.upload(np.arange(start, start + count, dtype=np.int32))

    def attend(self, w: Dense, h: Buffer, positions: Buffer, cache: Cache) -> None:
        """Add the attention block's output to h [T, H], whose rows stand at `positions` of one sequence."""
        b, cfg = self.backend, self.cfg
        t = ops.rmsnorm(b, h, w.norms["input_layernorm"], cfg.rms_norm_eps)
        q, k, v = (ops.matvec(b, w.matrices[name], t) for name in "qkv")
        self.after("qkv")
        q = ops.rmsnorm(b, q, w.norms["self_attn.q_norm"], cfg.rms_norm_eps)
        k = ops.rmsnorm(b, k, w.norms["self_attn.k_norm"], cfg.rms_norm_eps)
        for x in (q, k):
            ops.rope(b, x, self._cos, self._sin, positions, cfg.head_dim)
        ops.kv_append(b, cache.k, cache.v, k, v, positions)
        mixed = ops.attention(b, q, cache.k, cache.v, positions, cfg.head_dim)
        self.after("attention")
        ops.add(b, h, ops.matvec(b, w.matrices["o"], mixed))
        self.after("o")

    def route(self, w: Dense, h: Buffer) -> tuple[Buffer, Buffer, Buffer]:
        """The router's choice: (normed inputs f32 [T, H], expert ids i32 [T, k], their weights f32 [T, k])."""
        b = self.backend
        t = ops.rmsnorm(b, h, w.norms["post_attention_layernorm"], self.cfg.rms_norm_eps)
        logits = ops.matvec(b, w.router, t)
        ids, weights = ops.router_top_k(b, logits, w.bias, self.cfg.num_experts_per_tok)
        self.after("router")
        return t, ids, weights

    def mix(self, w: Dense, experts: Expert, h: Buffer, routed: tuple[Buffer, Buffer, Buffer]) -> None:
        """Add the weighted outputs of the routed experts to h [T, H]."""
        b, (t, ids, weights) = self.backend, routed
        rotated = FORMATS_ROTATED[experts["w1"].format]
        x = ops.scale_rotate(b, t, w.scale, self._signs, rotated)
        self.after("rotate")
        w2 = experts["w2"]
        matrices = experts["w1"], experts["w3"], w2
        y = ops.expert_mlp(b, matrices, ids, x, self._signs, FORMATS_ROTATED[w2.format])
        self.after("experts")
        ops.combine(b, h, y, weights)
        self.after("combine")

    def layer(
        self, layer: int, states: Sequence[Buffer], at: Sequence[Buffer], caches: Sequence[Cache]
    ) -> NDArray[Any]:
        """Run one layer over every sequence's h [T, H] in place; returns the chosen expert ids i32 [ΣT, k]."""
        w = self.dense(layer)
        for h, positions, cache in zip(states, at, caches, strict=True):
            self.attend(w, h, positions, cache)
        routed = [self.route(w, h) for h in states]
        ids = np.concatenate([self.backend.download(ids) for _, ids, _ in routed])
        if (ids < 0).any():
            raise CheckError(f"layer {layer}: the router's input is not a number", file=self.file.path)
        experts = self.experts(layer, np.unique(ids).tolist())
        self.after("load")
        for h, choice in zip(states, routed, strict=True):
            self.mix(w, experts, h, choice)
        return ids

    def logits(self, states: Sequence[Buffer]) -> Iterator[NDArray[np.float32]]:
        """Next-token logits f32 [T, vocab] from each sequence's final hidden states [T, H]."""
        self._forget(-1)
        norm = self._end("norm", lambda: self._vector("model.norm.weight"))
        head = self._end("head", lambda: self._matrix("lm_head.weight"))
        for h in states:
            t = ops.rmsnorm(self.backend, h, norm, self.cfg.rms_norm_eps)
            logits = self.backend.download(ops.matvec(self.backend, head, t))
            self.after("lm_head")
            yield logits

    def head(self, low: int, high: int) -> Callable[[Buffer], NDArray[np.float32]]:
        """Load rows low to high of lm_head: what makes logits f32 [T, high - low] of final hidden states [T, H]."""
        entry = self.file.entry("lm_head.weight")
        each = entry.nbytes // entry.shape[0]
        payload = self.file.read_range(entry, low * each, high * each)
        self.traffic.read += payload.nbytes
        rows = ops.matrix(self.backend, payload, format_of(self.file, entry).name, high - low, entry.shape[1])
        norm = self._end("norm", lambda: self._vector("model.norm.weight"))

        def logits(h: Buffer) -> NDArray[np.float32]:
            t = ops.rmsnorm(self.backend, h, norm, self.cfg.rms_norm_eps)
            return self.backend.download(ops.matvec(self.backend, rows, t))

        return logits

    def greedy(
        self,
        prompt: NDArray[np.integer],
        count: int,
        stop: frozenset[int] = frozenset(),
        watch: Watch = UNWATCHED,
    ) -> list[int]:
        """Continue one sequence of token ids [T] by its most likely tokens: at most `count`, and none after one of
        `stop`. `watch` hears of each.
        """
        caches = [self.cache() for _ in range(self.cfg.num_hidden_layers)]
        tokens, done, out = np.asarray(prompt), 0, list[int]()
        while len(out) < count and done + len(tokens) <= self.capacity:
            h, at = self.embed(tokens), self.positions(done, len(tokens))
            for layer, cache in enumerate(caches):
                self.layer(layer, [h], [at], [cache])
            (values,) = self.logits([h.rows(len(tokens) - 1, len(tokens))])
            done += len(tokens)
            out.append(int(values[0].argmax()))
            watch.advance(1)
            if out[-1] in stop:
                break
            tokens = np.array(out[-1:])
        return out
