"""The tiny source: a random MiniMax-M2 checkpoint with the released layout, made on first use.

It has the real head and rotary dimensions, several groups per row, heavy-tailed weights, channels of very unequal scale
and correlated hidden states. A build of it therefore takes the same paths as a build of the real model, in seconds.

The committed hashes of the tiers depend on every weight and every importance, so both must have the same bits on every
machine. The weights are made from integers of PCG64 by operations that IEEE 754 rounds exactly (+, ·, /, √), never by
exp, log or a BLAS product. The importances come from a run of the model in f64. They are rounded to 10 mantissa bits,
because BLAS and libm differ between machines in the last bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from ...formats import fp8
from ...formats.checkpoint.local import open_checkpoint
from ...formats.minimax import ModelConfig, expert_name, inventory, layer_prefix, parse_config, scale_inv_name
from ...formats.statistics.imatrix import GGUF_NAMES, ImatrixEntry, write_imatrix
from ...verify.model.reference import Observer, Routing, layer_by_layer
from .folder import TinySpec
from .tokenizer import CHAT_TEMPLATE, SPECIAL, first_word, tokenizer_json

STEADY = 2.0
"""The value of channel 0 in every embedding: real models have such large, steady channels too."""
ROUTER_LEVEL = -3.0
"""The mean of the router's logits, which the router reads from channel 0. At this level few experts dominate a token,
so a near tie for the last place matters little."""
F64 = NDArray[np.float64]


def write_tiny(folder: Path, spec: TinySpec) -> None:
    """Write a whole checkpoint with its imatrix and tokens into an existing folder."""
    raw = spec.config()
    cfg = parse_config(raw)
    _write_shards(folder, cfg)
    _write_json(folder / "config.json", raw)
    _write_json(folder / "tokenizer.json", tokenizer_json(spec.vocab_size))
    eos = raw["eos_token_id"]
    special = {"eos_token": SPECIAL[0], "add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    _write_json(folder / "tokenizer_config.json", special)
    _write_json(folder / "generation_config.json", {"eos_token_id": eos, "do_sample": False})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    calibration = _tokens("calib", spec.calib_shape, spec.vocab_size)
    np.save(folder / "calib_tokens.npy", calibration)
    np.save(folder / "eval_tokens.npy", _tokens("eval", spec.eval_shape, spec.vocab_size))
    gathered = _Importance(cfg)
    for _ in layer_by_layer(open_checkpoint(folder), cfg, calibration, gathered, torch.float64):
        pass
    rows, length = spec.calib_shape
    write_imatrix(folder / "imatrix.gguf", gathered.entries(), ("tiny",), rows, length)


# --- numbers that are the same everywhere ---------------------------------------------------------------------------


def _draw(name: str, count: int) -> NDArray[np.uint64]:
    """`count` raw 64-bit draws that belong to `name`."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.asarray(np.random.PCG64(seed).random_raw(count), "<u8")


def _bells(name: str, count: int) -> NDArray[np.int64]:
    """Bell-shaped integers: centred sums of four 16-bit draws."""
    fields = _draw(name, count).view("<u2").reshape(count, 4).astype(np.int64)
    centred: NDArray[np.int64] = fields.sum(axis=1) - 2 * 65535
    return centred


def _heavy(name: str, shape: tuple[int, ...]) -> F64:
    """Student-t values of four degrees of freedom, cut at ±12: heavy tails, variance about 2."""
    count = int(np.prod(shape))
    z = _bells(name, 5 * count).reshape(5, count)
    spread = np.sqrt((z[1] ** 2 + z[2] ** 2 + z[3] ** 2 + z[4] ** 2).astype(np.float64) / 4)
    values: F64 = np.clip(z[0] / np.maximum(spread, 1.0), -12, 12).reshape(shape)
    return values


def _scales(name: str, count: int, bits: int, outliers: bool = False) -> F64:
    """Positive scales with 4 significant bits: 2 to a binomial power of variance bits/4; 1 in 64 is 8 times larger."""
    draws = _draw(name, count)
    power = sum(((draws >> np.uint64(i)) & np.uint64(1)).astype(np.int64) for i in range(bits)) - bits // 2
    eighths = ((draws >> np.uint64(16)) & np.uint64(7)).astype(np.int64) + 8
    if outliers:
        power = power + 3 * (((draws >> np.uint64(32)) & np.uint64(63)) == 0)
    scales: F64 = np.ldexp(eighths / 8.0, power)
    return scales


def _tokens(name: str, shape: tuple[int, int], vocab: int) -> NDArray[np.int32]:
    """Token ids of a skewed distribution: products of two uniform draws, small ranks the most frequent, words first."""
    halves = _draw(name, int(np.prod(shape))).view("<u4").reshape(-1, 2).astype(np.uint64)
    rank = ((halves[:, 0] * halves[:, 1] >> np.uint64(32)) * np.uint64(vocab - len(SPECIAL))) >> np.uint64(32)
    words = first_word(vocab)
    return ((rank.astype(np.int64) + words) % (vocab - len(SPECIAL))).astype(np.int32).reshape(shape)


def _round(x: F64) -> F64:
    """Round to 10 mantissa bits."""
    mantissa, exponent = np.frexp(x)
    rounded: F64 = np.ldexp(np.rint(np.ldexp(mantissa, 11)), exponent - 11)
    return rounded


# --- weights --------------------------------------------------------------------------------------------------------


def _matrix(name: str, shape: tuple[int, int], gain: float, inputs: F64, rows: F64 | None = None) -> F64:
    """A heavy-tailed matrix: outputs deviate by about `gain` · rows for inputs of scale `inputs`.

    The sum below adds numbers of few significant bits, so it is exact in any order.
    """
    columns = _scales(f"{name}/columns", shape[1], 2)
    energy = float(np.sum((columns * inputs) ** 2))
    weights: F64 = _heavy(name, shape) * columns * (gain / np.sqrt(2 * energy))
    return weights if rows is None else weights * rows[:, None]


def _norm(name: str, count: int) -> F64:
    """A norm's weights; the one before the experts has channels of very unequal scale and outliers."""
    unequal = "post_attention" in name
    scales = _scales(name, count, 4 if unequal else 2, outliers=unequal)
    return scales / 2 if "k_norm" in name else scales


def _embedding(name: str, shape: tuple[int, int]) -> F64:
    """Rows that share 32 directions and a steady channel, so that hidden states are correlated; exact integers."""
    factors = _bells(f"{name}/factors", shape[0] * 32).reshape(-1, 32) >> 12
    basis = _bells(f"{name}/basis", 32 * shape[1]).reshape(32, -1) >> 12
    own = _bells(name, shape[0] * shape[1]).reshape(shape) >> 6
    rows: F64 = ((factors @ basis) + own) / 1024.0
    rows[:, 0] = STEADY
    return rows


def _ones(count: int) -> F64:
    return np.ones(count)


def _values(cfg: ModelConfig) -> Iterator[tuple[str, str, F64]]:
    """(name, how it is stored, values f64) of every weight. The gains keep the residual stream and the logits O(1)."""
    words = first_word(cfg.vocab_size)
    for spec in inventory(cfg):
        name, shape, layer = spec.name, spec.shape, spec.layer
        if spec.role == "norm":
            values = _norm(name, shape[0])
        elif spec.role == "embed":
            values = _embedding(name, (shape[0], shape[1]))
        elif spec.role == "lm_head":
            quiet = np.where(np.arange(shape[0]) < words, 0.25, 1.0)
            quiet[shape[0] - len(SPECIAL) :] = 0.25
            final = _norm("model.norm.weight", shape[1])
            values = _matrix(name, (shape[0], shape[1]), 2.0, final, quiet)
        elif spec.role == "bias":
            values = _bells(name, shape[0]) / 2.0**22
        else:
            assert layer is not None
            values = _layer_matrix(cfg, name, (shape[0], shape[1]), layer, spec.projection, spec.expert)
        yield name, spec.stored, values


def _layer_matrix(
    cfg: ModelConfig,
    name: str,
    shape: tuple[int, int],
    layer: int,
    projection: str | None,
    expert: int | None,
) -> F64:
    p = layer_prefix(layer)
    if projection is None and "self_attn" in name:
        if "o_proj" in name:
            return _matrix(name, shape, 0.5, _ones(shape[1]))
        return _matrix(name, shape, 1.0, _norm(f"{p}input_layernorm.weight", shape[1]))
    inputs = _norm(f"{p}post_attention_layernorm.weight", cfg.hidden_size)
    if projection is None or expert is None:
        router = _matrix(name, shape, 1.5, inputs)
        router[:, 0] = ROUTER_LEVEL / (STEADY * inputs[0])
        return router
    up_rows = _scales(f"{expert_name(layer, expert, 'w3')}/rows", cfg.intermediate_size, 4)
    if projection == "w2":
        return _matrix(name, shape, 0.4, up_rows)
    return _matrix(name, shape, 1.0, inputs, up_rows if projection == "w3" else None)


def _stored(name: str, stored: str, values: F64) -> dict[str, Tensor]:
    """The tensors that hold one weight in the released layout."""
    tensor = torch.from_numpy(values.astype(np.float32))
    if stored != "fp8":
        return {name: tensor.to(torch.bfloat16) if stored == "bf16" else tensor}
    codes, scale_inv = fp8.quantize(tensor.numpy())
    return {
        name: torch.from_numpy(codes).view(torch.float8_e4m3fn),
        scale_inv_name(name): torch.from_numpy(scale_inv),
    }


def _write_shards(folder: Path, cfg: ModelConfig) -> None:
    tensors = {
        k: v for name, stored, values in _values(cfg) for k, v in _stored(name, stored, values).items()
    }
    total = sum(t.nbytes for t in tensors.values())
    shards: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    seen = 0
    for name, tensor in tensors.items():  # the first half of the bytes, wherever in a layer that ends
        shards[2 * seen >= total][name] = tensor
        seen += tensor.nbytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- the imatrix ----------------------------------------------------------------------------------------------------


@dataclass
class _Importance(Observer):
    """Sums of squares of what each expert's matrices see."""

    cfg: ModelConfig
    sums: dict[tuple[int, str], F64] = field(default_factory=dict)
    counts: dict[int, F64] = field(default_factory=dict)

    def routed(self, layer: int, inputs: Tensor, routing: Routing) -> None:
        n = self.cfg.num_local_experts
        self.counts[layer] = np.bincount(routing.ids.flatten().numpy(), minlength=n).astype(np.float64)
        for projection, width in (("w1", self.cfg.hidden_size), ("w2", self.cfg.intermediate_size)):
            self.sums[layer, projection] = np.zeros((n, width))

    def expert(self, layer: int, expert: int, tokens: Tensor, inputs: Tensor, product: Tensor) -> None:
        self.sums[layer, "w1"][expert] = inputs.square().sum(0).numpy()
        self.sums[layer, "w2"][expert] = product.square().sum(0).numpy()

    def entries(self) -> dict[str, ImatrixEntry]:
        out = {}
        for layer, counts in self.counts.items():
            for projection, name in GGUF_NAMES.items():
                sums = self.sums[layer, "w2" if projection == "w2" else "w1"]
                mean = _round(sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
                out[f"blk.{layer}.{name}.weight"] = ImatrixEntry(mean, counts)
        return out
