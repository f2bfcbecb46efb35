"""`mq-quant diff`: where two files differ, in metadata, formats, bytes and values.

Values are compared in the basis of the checkpoint: rotated back, without the AWQ scale, and with the folds of w3 into
w2 brought together. So files that were built with different scales and folds can be compared. Large tensors are read
some rows at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...formats.blocks import FORMATS
from ...formats.hfq import HfqFile, TensorEntry, open_hfq
from ...formats.hfq.checked import checksum, stated_checksums
from ...formats.hfq.provenance import KEY, PADDING
from ...formats.hfq.stored import RecoveredFolds, StoredForm, folds_down, stored_form
from ...formats.hfq.totals import format_name
from ...formats.minimax import expert_name, expert_of
from ...verify.model.hfq_weights import DecodedFile
from ..spec.provenance import flatten

_IGNORED = re.compile(rf"{KEY}\.({PADDING}|checksums)")
CHUNK_WEIGHTS = 1 << 22
SHOWN = 200
"""Characters of a metadata value that are shown."""
EQUAL_DB = 200.0
"""The signal to noise (dB) that stands for equal values, so that equality is a number in JSON too."""

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class MetadataDiff:
    """A metadata key whose values differ, None where one file does not have it; long values are cut."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True)
class TensorDiff:
    """A tensor that differs. `snr_db` is the signal to noise of B's values against A's: EQUAL_DB where only the bytes
    differ, None where the values cannot be compared (another shape, an unknown format, values that are not finite).
    """

    name: str
    format_a: str
    format_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    snr_db: float | None


@dataclass(frozen=True)
class Diff:
    """Where file B differs from file A. Names stand in file order; `equal_tensors` counts tensors of equal bytes.

    `trailing_a` and `trailing_b` count the bytes after the last tensor, which the engine ignores. `damaged` has path
    and tensor where bytes are not those that were written.
    """

    a: Path
    b: Path
    same_order: bool
    metadata: tuple[MetadataDiff, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    equal_tensors: int
    different_tensors: tuple[TensorDiff, ...]
    trailing_a: int = 0
    trailing_b: int = 0
    same_trailing: bool = True
    damaged: tuple[tuple[str, str], ...] = ()

    @property
    def identical(self) -> bool:
        """Whether metadata (but for what every build has of its own), names, order, payloads and rests are equal."""
        differ = self.metadata or self.only_a or self.only_b or self.different_tensors
        return self.same_order and self.same_trailing and not differ

    def as_json(self) -> dict[str, Any]:
        """What `mq-quant diff --json` prints."""
        return {**asdict(self), "a": str(self.a), "b": str(self.b), "identical": self.identical}


def diff_files(a: Path, b: Path) -> Diff:
    """Compare two HFQ files; raises HfqError where one of them is none."""
    with open_hfq(a) as first, open_hfq(b) as second:
        common = [(entry, second.entry(entry.name)) for entry in first.entries if entry.name in second]
        sides = _Sides(first, second)
        rows = [row for pair in common if (row := sides.compare(*pair)) is not None]
        return Diff(
            a=a,
            b=b,
            same_order=[e.name for e, _ in common] == [e.name for e in second.entries if e.name in first],
            metadata=_metadata(first, second),
            only_a=tuple(entry.name for entry in first.entries if entry.name not in second),
            only_b=tuple(entry.name for entry in second.entries if entry.name not in first),
            equal_tensors=len(common) - len(rows),
            different_tensors=tuple(rows),
            trailing_a=first.trailing_bytes,
            trailing_b=second.trailing_bytes,
            same_trailing=_same_trailing(first, second),
            damaged=(*_damaged(first, rows), *_damaged(second, rows)),
        )


def _damaged(file: HfqFile, rows: Sequence[TensorDiff]) -> Iterator[tuple[str, str]]:
    """The path of the file and the name of each tensor whose bytes are not those that were written."""
    stated = stated_checksums(file)
    for row in rows:
        if row.name in stated and checksum(file.chunks(file.entry(row.name))) != stated[row.name]:
            yield str(file.path), row.name


def _same_trailing(a: HfqFile, b: HfqFile) -> bool:
    if a.trailing_bytes != b.trailing_bytes:
        return False
    return all(np.array_equal(x, y) for x, y in zip(a.trailing(), b.trailing(), strict=True))


def _metadata(a: HfqFile, b: HfqFile) -> tuple[MetadataDiff, ...]:
    there, here = dict(flatten(a.metadata)), dict(flatten(b.metadata))
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key) and not _IGNORED.match(key)]
    rows = tuple(MetadataDiff(key, _short(there.get(key)), _short(here.get(key))) for key in keys)
    same = a.arch_id == b.arch_id
    return rows if same else (MetadataDiff("arch_id of the header", a.arch_id, b.arch_id), *rows)


def _short(value: Any) -> Any:
    text = str(value)
    return value if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"


class _Sides:
    """Two open files whose tensors are compared in one basis: that of the file without folds, else that of A."""

    def __init__(self, a: HfqFile, b: HfqFile) -> None:
        self.a, self.b = a, b
        folded = folds_down(a), folds_down(b)
        self._any_folded, self._undo_a = any(folded), folded == (True, False)
        ours, theirs = DecodedFile(a).weight, DecodedFile(b).weight
        self._folds = RecoveredFolds(theirs, ours) if self._undo_a else RecoveredFolds(ours, theirs)

    def compare(self, left: TensorEntry, right: TensorEntry) -> TensorDiff | None:
        """One tensor of both files; None where its bytes, format and shape are equal."""
        same_form = (left.quant_type, left.shape) == (right.quant_type, right.shape)
        chunks = zip(self.a.chunks(left), self.b.chunks(right), strict=True)
        if same_form and all(np.array_equal(x, y) for x, y in chunks):
            return None
        formats = format_name(left.quant_type), format_name(right.quant_type)
        return TensorDiff(left.name, *formats, left.shape, right.shape, self._snr(left, right))

    def _snr(self, left: TensorEntry, right: TensorEntry) -> float | None:
        if left.shape != right.shape or not {left.quant_type, right.quant_type} <= FORMATS.keys():
            return None
        fold = self._fold(right)
        ours = stored_form(self.a, left.name, fold if self._undo_a else None)
        theirs = stored_form(self.b, right.name, None if self._undo_a else fold)
        signal = error = 0.0
        for x, y in zip(_values(self.a, left, ours), _values(self.b, right, theirs), strict=True):
            signal += float(np.square(x, dtype=np.float64).sum())
            error += float(np.square(x.astype(np.float64) - y).sum())
        if not (math.isfinite(signal) and math.isfinite(error)):
            return None
        if error == 0:
            return EQUAL_DB
        return round(10 * math.log10(signal / error), 2) if signal > 0 else None

    def _fold(self, entry: TensorEntry) -> F32 | None:
        """The fold f32 [intermediate] of one file against the other; None where neither folds, or w3 is of no use."""
        place = expert_of(entry.name)
        if not self._any_folded or place is None:
            return None
        up = expert_name(place[0], place[1], "w3")
        known = all(up in file and file.entry(up).quant_type in FORMATS for file in (self.a, self.b))
        return self._folds.of(entry.name, entry.shape) if known else None


def _values(file: HfqFile, entry: TensorEntry, form: StoredForm) -> Iterator[F32]:
    """A tensor's values in the basis of the checkpoint, f32 [rows, K] for some rows at a time."""
    width = entry.shape[-1] if entry.shape else 1
    rows = math.prod(entry.shape) // width
    step = max(1, CHUNK_WEIGHTS // width)
    for low in range(0, rows, step):
        high = min(low + step, rows)
        part = file.read_range(entry, form.format.nbytes(low * width), form.format.nbytes(high * width))
        yield form.rows(low, high).decode(part, (high - low, width))
