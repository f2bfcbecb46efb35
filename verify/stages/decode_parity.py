"""Stage 2: the kernels' decode against the plain numpy decode of formats.blocks, bit for bit, and every value finite.

Tensors are decoded whole, some groups at a time, or, with a sample, a fixed choice of pieces of some tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.hfq import HfqFile, TensorEntry
from ...formats.hfq.stored import format_of
from ...formats.watch import UNWATCHED, Watch, watched
from ...kernels.forward import ops
from ...kernels.runtime.host import Backend
from ..model.hfq_weights import PIECE, pieces
from .stage import StageResult

SAMPLE_WEIGHTS = 1 << 16
"""Weights in one piece of a sample."""


@dataclass(frozen=True)
class DecodeFigures:
    """How many tensors of the file were decoded, and by which back end."""

    tensors: int
    of: int
    sampled: bool
    backend: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check_decode(
    file: HfqFile, backend: Backend, sample: bool = False, watch: Watch = UNWATCHED
) -> StageResult:
    """Decode every tensor (or a sample: first, middle and last pieces of some) on `backend` and compare all bits."""
    problems: list[str] = []
    blocks = 0
    tensors = sampled(file) if sample else file.entries
    for entry in watched(tensors, watch, "decode", "tensors", lambda entry: entry.name):
        fmt = format_of(file, entry)
        start = 0
        for payload in _sample_pieces(file, entry) if sample else pieces(file, entry, PIECE):
            groups = payload.size // fmt.group_bytes
            expected = fmt.decode(payload).reshape(-1)
            got = backend.download(ops.decode(backend, backend.upload(payload), fmt.name, expected.size))
            blocks += groups
            problem = _compare(expected, got, fmt.group, start)
            if problem:
                problems.append(f"{entry.name}: {problem}")
                break
            start += groups
    figures = DecodeFigures(len(tensors), len(file.entries), sample, backend.name)
    return StageResult("decode", blocks, "groups", tuple(problems), (), figures)


def _compare(expected: NDArray[np.float32], got: NDArray[np.float32], group: int, start: int) -> str | None:
    different = expected.view(np.uint32) != got.view(np.uint32)
    if different.any():
        at = int(different.argmax())
        where = f"weight {at % group} of group {start + at // group}"
        return f"{where} decodes to {got[at]!r} in the kernel, and to {expected[at]!r} in numpy"
    bad = ~np.isfinite(expected)
    if bad.any():
        at = int(bad.argmax())
        return f"weight {at % group} of group {start + at // group} is {expected[at]!r}"
    return None


def sampled(file: HfqFile) -> Sequence[TensorEntry]:
    """Everything but experts, and of each layer its first expert, its last, and one that changes with the layer."""
    experts: dict[str, dict[int, list[TensorEntry]]] = {}
    keep: list[TensorEntry] = []
    for entry in file.entries:
        layer, found, rest = entry.name.partition(".experts.")
        if found:
            experts.setdefault(layer, {}).setdefault(int(rest.split(".")[0]), []).append(entry)
        else:
            keep.append(entry)
    for i, by_expert in enumerate(experts.values()):
        ids = sorted(by_expert)
        for e in sorted({ids[0], ids[(1 + 37 * i) % len(ids)], ids[-1]}):
            keep += by_expert[e]
    return keep


def _sample_pieces(file: HfqFile, entry: TensorEntry) -> Iterator[NDArray[np.uint8]]:
    """The first, the middle and the last piece of a payload."""
    fmt = format_of(file, entry)
    step = max(1, SAMPLE_WEIGHTS // fmt.group) * fmt.group_bytes
    count = -(-entry.nbytes // step)
    for i in sorted({0, count // 2, count - 1}):
        yield file.read_range(entry, i * step, min((i + 1) * step, entry.nbytes))
