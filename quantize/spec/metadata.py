"""The metadata of a file: what the engine's loader reads, and our own provenance under one key.

The metadata stands before the payloads, but holds values that are known only after them (hashes, exponents). It is
therefore laid out with room for these: `template` fixes its length, `complete` fills it in and keeps that length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...formats.errors import OutputError
from ...formats.hfq import QuantizationHash, TensorMeta
from ...formats.hfq.layout import metadata_checksum
from ...formats.hfq.provenance import KEY, PADDING
from ...formats.minimax import ModelConfig, normalize_config
from ...formats.strictjson import dump_object
from .plan import PlannedTensor

SCHEMA = 1
PRODUCER = "mq-quant"
CHECKSUM = "xxh64"
LAYER_ROOM = 2048
"""Bytes kept free for what the encoder reports of each layer; one more such share is kept for the file."""
TUNED_ROOM = 512
"""Bytes kept free per layer for what tuning says about it, besides one such share for the file."""


@dataclass(frozen=True)
class SideFiles:
    """The texts beside the weights that go into the file; what the checkpoint lacks is None."""

    tokenizer: str | None = None
    tokenizer_config: Mapping[str, Any] | None = None
    generation_config: Mapping[str, Any] | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What is known when the last payload is written: hashes, what the encoder reports of each layer, and the record of
    the calibration where there is one.
    """

    quantization_hash: str
    checksums: Sequence[str]
    layers: Sequence[Mapping[str, Any]]
    calibration: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Totals:
    """All tensors of a file together. AWQ scales count as tensors and bytes, but their values are no weights."""

    tensors: int
    payload_bytes: int
    weights: int
    expert_weights: int
    quantised_weights: int
    """Weights in formats whose groups hold more than one."""


def totals_of(tensors: Sequence[PlannedTensor]) -> Totals:
    """The totals of a plan's tensors."""
    kept = [t for t in tensors if t.spec]
    return Totals(
        len(tensors),
        sum(t.nbytes for t in tensors),
        sum(t.weights for t in kept),
        sum(t.weights for t in kept if t.spec and t.spec.role == "expert"),
        sum(t.weights for t in kept if t.format.group > 1),
    )


def parameter_counts(config: ModelConfig, totals: Totals, skipped: int) -> dict[str, Any]:
    """The informational counts; `skipped` is the number of weights of modules that are left out."""
    total, experts = totals.weights, totals.expert_weights
    used, count = config.num_experts_per_tok, config.num_local_experts
    active = experts * used // count
    common = math.gcd(used, count)
    return {
        "schema": "hipfire.parameter_counts.v1",
        "total_params": total,
        "source_total_params": total + skipped,
        "active_params": total - experts + active,
        "effective_params": total,
        "quantized_params": totals.quantised_weights,
        "skipped_params": skipped,
        "moe": {
            "num_experts": count,
            "num_experts_per_tok": used,
            "routed_expert_params": experts,
            "routed_expert_active_params": active,
            "active_rule": "num_experts_per_tok / num_experts",
            "routed_active_fraction": {"numerator": used // common, "denominator": count // common},
        },
    }


def _tokenizer_config(side: SideFiles) -> dict[str, Any]:
    out = dict(side.tokenizer_config or {})
    if side.chat_template:  # the file of its own is what other programs take before the copy in this one
        out["chat_template"] = side.chat_template
    return out


def template(
    raw_config: Mapping[str, Any],
    side: SideFiles,
    config: ModelConfig,
    totals: Totals,
    provenance: Mapping[str, Any],
    skipped_params: int = 0,
) -> dict[str, Any]:
    """The metadata with the length it will have; `provenance` is everything of it that is known before the work."""
    blank = Outcome("0" * 16, ["0" * 16] * totals.tensors, [])
    room = " " * (LAYER_ROOM * (config.num_hidden_layers + 1))
    metadata: dict[str, Any] = {
        "architecture": "minimax_m2",
        "config": normalize_config(raw_config),
        **({"tokenizer": side.tokenizer} if side.tokenizer is not None else {}),
        "tokenizer_config": _tokenizer_config(side),
        "generation_config": dict(side.generation_config) if side.generation_config is not None else None,
        "quantization_hash": _hash_record(blank, totals.tensors, totals.payload_bytes),
        "parameter_counts": parameter_counts(config, totals, skipped_params),
        KEY: {"schema": SCHEMA, **provenance, **_outcome(blank), PADDING: room},
    }
    metadata[KEY]["metadata_checksum"] = metadata_checksum(metadata)
    return metadata


def relaid(
    metadata: Mapping[str, Any],
    document: Mapping[str, Any],
    more: Mapping[str, Any],
    tensors: Sequence[TensorMeta],
    config: ModelConfig,
) -> dict[str, Any]:
    """The metadata of a copy of a file, with the length that they will have; `complete` fills them in.

    `document` is what the file says it was made from, empty where it says nothing, and `more` is added to it. There is
    room for what is said of each layer besides.
    """
    layers = document.get("layers")
    blank = Outcome("0" * 16, ["0" * 16] * len(tensors), layers if isinstance(layers, list) else [])
    room = " " * (TUNED_ROOM * (config.num_hidden_layers + 1))
    stated = {"schema": SCHEMA, "metadata_checksum": metadata_checksum(metadata), **document, **more}
    return {
        **metadata,
        "quantization_hash": _hash_record(blank, len(tensors), sum(t.nbytes for t in tensors)),
        KEY: {**stated, **_outcome(blank), PADDING: room},
    }


def _hash_record(outcome: Outcome, tensors: int, payload_bytes: int) -> dict[str, Any]:
    return {
        **QuantizationHash().record(PRODUCER),
        "value": outcome.quantization_hash,
        "tensor_count": tensors,
        "payload_bytes": payload_bytes,
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "layers": [dict(layer) for layer in outcome.layers],
        "checksums": {
            "algorithm": CHECKSUM,
            "order": "as in the index",
            "values": "".join(outcome.checksums),
        },
    }


def complete(laid_out: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    """The finished metadata, of exactly the template's length.

    Raises OutputError where the layers' reports do not fit into the room that was kept for them.
    """
    calibration = {} if outcome.calibration is None else {"calibration": dict(outcome.calibration)}
    provenance = {**laid_out[KEY], **calibration, **_outcome(outcome)}
    done = {
        **laid_out,
        "quantization_hash": {**laid_out["quantization_hash"], "value": outcome.quantization_hash},
        KEY: {**provenance, PADDING: ""},
    }
    spare = len(dump_object(laid_out)) - len(dump_object(done))
    if spare < 0:
        raise OutputError(
            f"the encoder's reports take {-spare} bytes more than the file's layout keeps for them"
        )
    return {**done, KEY: {**provenance, PADDING: " " * spare}}
