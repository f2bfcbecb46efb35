"""Chooses pieces until every pick has its kilobytes, leaves out what stands elsewhere already, and orders them.

No piece of the calibration text shares a run of 13 words with the evaluation text, apart from what belongs to
the chat format; and no piece repeats more than a tenth of the runs of pieces before it.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from textmaking.catalogue import Pick

RUN = 13
"""Words in the runs by which texts are compared. A character of Chinese, Japanese or Korean is a word."""
REPEATED = 0.1
"""The share of a piece's runs that earlier pieces may hold."""
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)
_FORMAT = re.compile(
    r"\]~!b\[\]~b\]system\n.*?\[e~\[|\]~b\]\w+|\[e~\[|</?(?:minimax:tool_call|invoke|parameter|response|think)\b[^>]*>",
    re.DOTALL,
)
"""What belongs to the chat format and not to a conversation: the system's turn, the marks of turns, and tags."""


@dataclass(frozen=True)
class Piece:
    """A document of the finished text, and where it comes from."""

    pick: Pick
    label: str
    text: str

    @property
    def nbytes(self) -> int:
        return len(self.text.encode())


def runs(text: str) -> set[int]:
    """Hashes of all runs of `RUN` words of a text, without what belongs to the chat format."""
    words = _WORD.findall(_FORMAT.sub("", text).lower())
    return {hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1)}


def order(piece: Piece) -> bytes:
    """A place for the piece among those of its pick that depends on its label alone."""
    return hashlib.sha256(f"{piece.pick.source}\x1f{piece.label}".encode()).digest()


def select(
    candidates: Iterable[tuple[Pick, Sequence[Piece]]], forbidden: set[int], report: Counter[str]
) -> list[Piece]:
    """The pieces of every pick, in a fixed order, up to its kilobytes. `report` counts what is left out, and why."""
    chosen: list[Piece] = []
    seen: set[int] = set()
    for pick, pieces in candidates:
        total = 0
        for piece in sorted(pieces, key=order):
            if total + piece.nbytes / 2 > 1000 * pick.kilobytes:
                break
            own = runs(piece.text)
            if not own.isdisjoint(forbidden):
                report["shares a run with the evaluation text"] += 1
            elif len(own & seen) > REPEATED * len(own):
                report["repeats another piece"] += 1
            else:
                seen |= own
                total += piece.nbytes
                chosen.append(piece)
        if total < 900 * pick.kilobytes:
            report[
                f"short: {pick.source} {pick.kind} {pick.form} {total / 1000:.1f} of {pick.kilobytes} kB"
            ] += 1
    return chosen


def interleave(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces in an order in which every prefix holds each kind, and within a kind each pick, by its share.

    The next piece is of the kind whose share is served least, counting half of the piece: ties go to the larger kind.
    """

    def merged(queues: dict[object, list[Piece]]) -> list[Piece]:
        totals = {key: sum(p.nbytes for p in queue) for key, queue in queues.items()}
        rank = {key: i for i, key in enumerate(sorted(totals, key=lambda k: (-totals[k], str(k))))}
        served, taken, out = dict.fromkeys(queues, 0), dict.fromkeys(queues, 0), []
        for _ in range(sum(map(len, queues.values()))):
            waiting = [key for key in queues if taken[key] < len(queues[key])]
            key = min(
                waiting, key=lambda k: ((served[k] + queues[k][taken[k]].nbytes / 2) / totals[k], rank[k])
            )
            out.append(queues[key][taken[key]])
            served[key] += out[-1].nbytes
            taken[key] += 1
        return out

    kinds: dict[str, dict[object, list[Piece]]] = defaultdict(lambda: defaultdict(list))
    for piece in pieces:
        kinds[piece.pick.kind][piece.pick].append(piece)
    return merged({kind: merged(picks) for kind, picks in kinds.items()})
