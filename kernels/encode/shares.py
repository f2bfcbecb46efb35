"""How rows answer each other, as an encoder has it on its device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from numpy.typing import NDArray

from ..runtime.host import Buffer

Answers = Sequence[tuple[slice, Buffer]]
"""For each block of rows the share f32 [rows, before] of the errors of rows before it that is added to its target; as
`lloyd.row_blocks` has them, but that `before` is a multiple of 16.
"""
Share = TypeVar("Share", Buffer, NDArray[Any])


class Shares:
    """The answers that were asked for last, always in the same memory: they serve all matrices of a layer."""

    def __init__(self) -> None:
        self._given: Sequence[object] = ()
        self._here: Answers = ()

    def of(self, answers: Sequence[tuple[slice, Share]], bring: Callable[[str, Share], Buffer]) -> Answers:
        """The same on the device, to which bring(name, share) takes those that are not there yet."""
        given = [share.memory if isinstance(share, Buffer) else share for _, share in answers]
        # What is there is kept alive here, so that no other share can be at its place in memory.
        if len(given) != len(self._given) or any(a is not b for a, b in zip(given, self._given, strict=True)):
            self._here = [(rows, bring(f"share {n}", share)) for n, (rows, share) in enumerate(answers)]
            self._given = given
        return self._here
