"""The files of a kit's models: codes and levels are drawn as integers, so nothing is fitted and every machine makes the
same bytes.

Levels are such that decoded weights have about the deviation `gain` / √columns. The rows of the first head's queries
are four times the second's, so that a norm over each head differs from one over both; AWQ scales and norms are uneven,
and routing biases are large, so that every known fault shows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ....formats.blocks import BY_NAME, AffineFormat, Format, LloydFormat, Q8Format
from ....formats.hfq import TensorMeta, write_hfq
from ....formats.hfq.layout import QuantizationHash
from ....formats.minimax import TensorSpec, awq_scale_name, inventory, parse_config
from ...spec.metadata import Outcome, SideFiles, Totals, complete, template
from ...spec.provenance import program
from ...tiny.tokenizer import CHAT_TEMPLATE, tokenizer_json
from .shapes import HEAD_DIM, VOCABULARY, KitModel

U8 = NDArray[np.uint8]
F64 = NDArray[np.float64]

GAINS = {"embed": 1.0, "lm_head": 2.0, "router": 1.5, "attn": 1.0, "w1": 1.5, "w3": 1.5, "w2": 3.0}
"""About how large the outputs of a matrix are for inputs of size 1; embeddings are of that size themselves."""
NORMAL = {2: (-1.15, -0.32), 3: (-1.53, -0.89, -0.49, -0.16)}
"""The lower half of levels that equal shares of a normal distribution have, by bits."""


def draw(name: str, count: int) -> NDArray[np.uint64]:
    """`count` raw 64-bit draws that belong to `name`."""
    seed = int.from_bytes(hashlib.sha256(f"kit {name}".encode()).digest()[:16], "little")
    return np.asarray(np.random.PCG64(seed).random_raw(count), "<u8")


def _bytes(name: str, count: int) -> U8:
    return draw(name, -(-count // 8)).view(np.uint8)[:count]


def spread(name: str, count: int) -> F64:
    """Positive values from 0.5 to 1.94, f64 [count]: multiples of 1/16 times a half or one, exact in f16."""
    raw = draw(name, count)
    halves = np.ldexp(1.0, -(raw >> np.uint64(32) & np.uint64(1)).astype(np.int64))
    return (16 + (raw & np.uint64(15)).astype(np.float64)) / 16 * halves


def payload(name: str, fmt: Format, rows: int, columns: int, deviation: float) -> U8:
    """A matrix's payload u8 [bytes] in a block format, its decoded weights of about this deviation."""
    groups = rows * columns // fmt.group
    uneven = spread(f"{name}/levels", groups)[:, None]
    if isinstance(fmt, LloydFormat):
        low = np.array(NORMAL[fmt.bits])
        book = (np.concatenate([low, -low[::-1]]) * deviation * uneven).astype(np.float16)
        codes = _codes(name, groups, fmt.bits)
        return fmt.pack(book, codes).reshape(-1)
    if isinstance(fmt, AffineFormat):
        scale = (deviation * math.sqrt(12) / fmt.levels * uneven[:, 0]).astype(np.float32)
        zero = (scale * np.float32((1 - fmt.levels) / 2)).astype(np.float32)
        return fmt.pack(scale, zero, _codes(name, groups, fmt.bits)).reshape(-1)
    assert isinstance(fmt, Q8Format)
    halves = (deviation * math.sqrt(12) / 256 * uneven[:, 0]).astype(np.float16)
    return fmt.pack(halves, _bytes(name, groups * fmt.group).view(np.int8).reshape(groups, -1)).reshape(-1)


def _codes(name: str, groups: int, bits: int) -> U8:
    """Uniform codes u8 [groups, 256]."""
    return (_bytes(name, groups * 256) & np.uint8((1 << bits) - 1)).reshape(groups, 256)


def _values(spec: TensorSpec) -> F64:
    """The values of a norm or of the routing bias, f64 [n]."""
    count = spec.shape[0]
    if spec.role == "bias":
        return np.where(np.arange(count) % 2, -0.25, 0.75)
    return spread(spec.name, count) * (1.5 if "_norm.weight" in spec.name and "self_attn" in spec.name else 1)


def _matrix(model: KitModel, spec: TensorSpec) -> tuple[Format, U8]:
    rows, columns = spec.shape
    fmt = BY_NAME["Q8F16"]
    if spec.projection and spec.layer is not None:
        gate_up, down = model.layers[spec.layer]
        fmt = BY_NAME[down if spec.projection == "w2" else gate_up]
    gain = GAINS[spec.projection or spec.role]
    deviation = gain if spec.role == "embed" else gain / math.sqrt(columns)
    made = payload(spec.name, fmt, rows, columns, deviation)
    if spec.name.endswith("q_proj.weight"):
        assert isinstance(fmt, Q8Format)
        scale, codes = fmt.unpack(made)
        louder = np.repeat([4.0, 1.0], HEAD_DIM * columns // fmt.group).astype(np.float16)
        made = fmt.pack(scale * louder, codes).reshape(-1)
    return fmt, made


def tensors_of(model: KitModel) -> Iterator[tuple[TensorSpec | None, TensorMeta, U8]]:
    """Every tensor in file order, each layer's AWQ scale (without a spec) before its first expert."""
    config = parse_config(model.config())
    for spec in inventory(config):
        if spec.projection == "w1" and spec.expert == 0 and spec.layer is not None:
            name, f16 = awq_scale_name(spec.layer), BY_NAME["F16"]
            scale = f16_payload(spread(name, config.hidden_size))
            yield None, TensorMeta(name, f16.quant_type, (config.hidden_size,), 0, scale.nbytes), scale
        if spec.role in ("norm", "bias"):
            fmt = BY_NAME["F32" if spec.role == "bias" else "F16"]
            dtype = "<f4" if spec.role == "bias" else "<f2"
            made = _values(spec).astype(dtype).view(np.uint8)
        else:
            fmt, made = _matrix(model, spec)
        yield spec, TensorMeta(spec.name, fmt.quant_type, spec.shape, fmt.group_size, made.nbytes), made


def f16_payload(values: F64) -> U8:
    """Values as the payload u8 [2 · n] of an F16 tensor."""
    return values.astype("<f2").view(np.uint8)


def write_model(model: KitModel, path: Path) -> None:
    """Write a model's file, with all that the engine's loader reads."""
    made = list(tensors_of(model))
    digest, checksums = QuantizationHash(), []
    for _, meta, data in made:
        digest.update(meta, [data])
        checksums.append(xxhash.xxh64(data.tobytes()).hexdigest())
    kept = [(spec, meta, math.prod(meta.shape)) for spec, meta, _ in made if spec is not None]
    totals = Totals(
        len(made),
        sum(data.nbytes for _, _, data in made),
        sum(weights for _, _, weights in kept),
        sum(weights for spec, _, weights in kept if spec.role == "expert"),
        sum(weights for _, meta, weights in kept if meta.group_size > 1),
    )
    config = parse_config(model.config())
    side = SideFiles(json.dumps(tokenizer_json(VOCABULARY)), {}, {}, CHAT_TEMPLATE)
    stated: dict[str, Any] = {"program": {"version": program()["version"], "commit": None}, "kit": model.name}
    laid = template(model.config(), side, config, totals, stated)
    metadata = complete(laid, Outcome(digest.hexdigest, checksums, []))
    write_hfq(path, metadata, [(meta, data) for _, meta, data in made])
