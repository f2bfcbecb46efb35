"""What a checkpoint must hold, and what it may hold beside: names, dtypes and shapes against the config.

Everything is judged on the shards' headers, before a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..fp8 import scale_shape
from ..minimax import ModelConfig, TensorSpec, inventory
from ..text import shortened
from .mtp import UNCOUNTED_HINT, FurtherLayers, further_layers
from .safetensors_file import TensorInfo, some
from .weights import FLOATS, FP8, SCALE_SUFFIXES, SCALES, scale_of

SHOWN = 8
"""Problems that a message lists."""

_UNUSED = re.compile(
    r".*\.(rotary_emb\.(original_inv_freq|inv_freq|cos_cached|sin_cached)|(q|k|v|kv|input|output|activation)_scale)"
)
"""Tables that every reader computes for itself, and scales of activations: no weight depends on them."""
_FUSED = re.compile(r".*\.mlp\.experts\.(gate_up_proj|down_proj)")

_INCOMPLETE = "the shards and config.json are not of one model, or the checkpoint is incomplete"
_NO_HEAD = (
    "the checkpoint is incomplete; if the model ties its embeddings (tie_word_embeddings), store a copy of "
    "model.embed_tokens.weight as lm_head.weight"
)
_KINDS = f"mq-quant reads FP8 matrices of type {FP8} with a scale for each block, and weights in {', '.join(FLOATS)}"
_PAIRS = "each FP8 matrix needs its own scales, named like it with the ending _scale_inv or _scale"


@dataclass(frozen=True)
class Problem:
    """What is wrong with one tensor, and what that may come from."""

    tensor: str
    text: str
    hint: str


@dataclass(frozen=True)
class LeftOut:
    """Tensors of a checkpoint that no file for the engine holds."""

    further: FurtherLayers
    unused: tuple[str, ...]

    @property
    def mtp(self) -> tuple[str, ...]:
        """Those of multi-token-prediction modules."""
        return self.further.mtp

    @property
    def names(self) -> frozenset[str]:
        """All of them."""
        return frozenset((*self.mtp, *self.unused))

    def notes(self) -> tuple[str, ...]:
        """A sentence for each kind that there is."""
        kinds = (
            (self.mtp, "belong to multi-token-prediction modules, which the engine does not run"),
            (self.unused, "hold no weights"),
        )
        return tuple(
            f"{len(names)} tensors of the checkpoint {why}; they are left out: {some(names, 2)}"
            for names, why in kinds
            if names
        )


def left_out(tensors: Mapping[str, TensorInfo], config: ModelConfig, raw: Mapping[str, Any]) -> LeftOut:
    """Which tensors of a checkpoint are not used; `raw` is config.json."""
    unused = tuple(name for name in tensors if _UNUSED.fullmatch(name))
    return LeftOut(further_layers(set(tensors).difference(unused), config, raw), unused)


def check_inventory(
    tensors: Mapping[str, TensorInfo], config: ModelConfig, apart: LeftOut, file: str | Path
) -> None:
    """Hold all tensors but those `apart` against what the config calls for.

    CheckpointError names the first that do not fit.
    """
    problems = list(islice(_problems(tensors, config, apart), SHOWN + 1))
    if not problems:
        return
    hint = problems[0].hint
    if len(problems) == 1:
        raise CheckpointError(problems[0].text, file=file, tensor=problems[0].tensor, hint=hint)
    lines = [f"\n  {shortened(p.tensor)}: {p.text}" for p in problems[:SHOWN]]
    more = "\n  and more" if len(problems) > SHOWN else ""
    raise CheckpointError("the tensors do not fit the config:" + "".join(lines) + more, file=file, hint=hint)


def _problems(tensors: Mapping[str, TensorInfo], config: ModelConfig, apart: LeftOut) -> Iterator[Problem]:
    """Every problem, lazily, so that only as many are looked for as are shown."""
    fused = next((name for name in tensors if _FUSED.fullmatch(name)), None)
    if fused is not None:
        yield Problem(
            fused,
            "holds all experts of a layer in one tensor, as transformers keeps them in memory; "
            "mq-quant reads one tensor per matrix",
            "save the model in the layout of the released checkpoint (experts.0.w1.weight and so on)",
        )
        return
    if apart.further.uncounted:
        yield Problem(apart.further.uncounted[0], apart.further.problem, UNCOUNTED_HINT)
    known = {*apart.names, *apart.further.uncounted}
    for spec in inventory(config):
        known.add(spec.name)
        info = tensors.get(spec.name)
        if info is None:
            yield Problem(spec.name, "is missing", _NO_HEAD if spec.role == "lm_head" else _INCOMPLETE)
            continue
        allowed = (FP8, *FLOATS) if spec.stored == "fp8" else FLOATS
        if info.dtype not in allowed:
            yield Problem(
                spec.name, f"is {info.dtype}, not {', '.join(allowed[:-1])} or {allowed[-1]}", _KINDS
            )
        if info.shape != spec.shape:
            yield Problem(
                spec.name,
                f"has shape {list(info.shape)}, the config calls for {list(spec.shape)}",
                _INCOMPLETE,
            )
        elif info.dtype == FP8 and spec.stored == "fp8":
            scale = scale_of(spec.name, tensors)
            if scale is not None:
                known.add(scale.name)
            yield from _scale_problems(spec, scale, config)
    for name in tensors:
        if name not in known:
            yield _stranger(name, tensors)


def _scale_problems(spec: TensorSpec, scale: TensorInfo | None, config: ModelConfig) -> Iterator[Problem]:
    if scale is None:
        yield Problem(spec.name, f"is FP8, but its scale {spec.name}{SCALE_SUFFIXES[0]} is missing", _PAIRS)
        return
    needed = scale_shape(spec.shape, config.block_shape)
    if scale.dtype not in SCALES:
        yield Problem(
            scale.name, f"is {scale.dtype}, and scales are {', '.join(SCALES[:-1])} or {SCALES[-1]}", _KINDS
        )
    if scale.shape != needed and not (needed == (1, 1) and scale.shape in ((), (1,))):
        rows, cols = config.block_shape
        yield Problem(
            scale.name,
            f"is {scale.dtype} {list(scale.shape)}, but for blocks of {rows} x {cols} its weight of shape "
            f"{list(spec.shape)} needs {list(needed)} scales",
            "quantization_config.weight_block_size in config.json must be the block size that the scales were made for",
        )


def _stranger(name: str, tensors: Mapping[str, TensorInfo]) -> Problem:
    """A tensor that the inventory does not know."""
    suffix = next((s for s in SCALE_SUFFIXES if name.endswith(s)), None)
    if suffix is None:
        return Problem(name, "is not a tensor of this model", _INCOMPLETE)
    weight = tensors.get(name.removesuffix(suffix))
    if weight is None:
        return Problem(name, "is a scale without its weight", _PAIRS)
    text = "is a second scale of its weight" if weight.dtype == FP8 else "scales a weight that is not FP8"
    return Problem(name, text, _PAIRS)
