"""What the engine runs: the formats of each kind of tensor, one format per layer and projection, and its cache.

The plan of a build and the check of a finished file both judge by these rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .blocks import EXPERT_FORMATS, F16_FORMAT, F32_FORMAT, Q8F16
from .minimax import Role, TensorSpec


@dataclass(frozen=True)
class Rule:
    """The block formats (quant types) in which the engine runs a kind of tensor, and a sentence that says so."""

    quant_types: frozenset[int]
    why: str


_FLOATS = frozenset({F16_FORMAT.quant_type, F32_FORMAT.quant_type})
_Q8 = frozenset({Q8F16.quant_type})

RULES: Mapping[Role, Rule] = {
    "norm": Rule(_FLOATS, "norms must be F16 or F32"),
    "bias": Rule(_FLOATS, "the routing bias must be F16 or F32"),
    "router": Rule(_Q8, "the router must be Q8F16: the engine's kernel for other formats gives wrong logits"),
    "expert": Rule(EXPERT_FORMATS, "the engine runs experts only in MQ4, MQ6, MQ2-Lloyd and MQ3-Lloyd"),
    "embed": Rule(_Q8, "embeddings must be Q8F16"),
    "lm_head": Rule(_Q8, "lm_head must be Q8F16"),
    "attn": Rule(_Q8, "attention must be Q8F16: its inputs are not rotated"),
}

CONTEXT = 12288
"""The longest context, in tokens, that the engine runs a MiniMax-M2 with; it lowers what a config allows to this."""
CACHE_BITS = 8.5
"""Bits of a value in the engine's key/value cache: Q8 with a scale for each 32 values."""

SPLITTING = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""The pattern by which the engine splits every text into words (that of cl100k), whatever the file's pre_tokenizer."""

ONE_FORMAT = (
    "the engine reads the format of a layer's gate and up, and of its down, from expert 0: keep them equal"
)


def refused(spec: TensorSpec, quant_type: int) -> str | None:
    """Why the engine does not run a tensor in this format; None where it does."""
    rule = RULES[spec.role]
    return None if quant_type in rule.quant_types else rule.why


def uneven(tensors: Iterable[tuple[TensorSpec, int]]) -> Iterator[tuple[TensorSpec, TensorSpec]]:
    """Experts whose quant type is not that of their layer: (the expert, the first of its layer and projection).

    Gate and up count as one projection, down as another.
    """
    first: dict[tuple[int | None, bool], tuple[TensorSpec, int]] = {}
    for spec, quant_type in tensors:
        if spec.role == "expert":
            model, expected = first.setdefault((spec.layer, spec.projection == "w2"), (spec, quant_type))
            if quant_type != expected:
                yield spec, model
