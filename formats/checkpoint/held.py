"""A source that several builds read one after the other: what one of them releases stays for the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..minimax import ModelConfig
from ..watch import UNWATCHED, Watch
from .safetensors_file import TensorInfo
from .source import F32, U8, Source


class HeldSource:
    """A source whose tensors are scheduled and released by `hold` and `let_go`, and by nobody who is given it.

    So its shards are fetched once for all builds. As `Source` in everything else.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._held: Sequence[str] = ()

    def hold(self, names: Sequence[str]) -> None:
        """Have these weights ready until `let_go`."""
        self._held = names
        self._source.schedule(names)

    def let_go(self) -> None:
        """Give back what is held."""
        for name in self._held:
            self._source.release(name)
        self._held = ()

    @property
    def raw_config(self) -> dict[str, Any]:
        return self._source.raw_config

    @property
    def config(self) -> ModelConfig:
        return self._source.config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._source.tensors

    @property
    def shards(self) -> tuple[str, ...]:
        return self._source.shards

    @property
    def skipped_mtp(self) -> tuple[str, ...]:
        return self._source.skipped_mtp

    @property
    def notes(self) -> tuple[str, ...]:
        return self._source.notes

    @property
    def origin(self) -> dict[str, str]:
        return self._source.origin

    def validate(self) -> None:
        self._source.validate()

    def side_file(self, name: str) -> Path | None:
        return self._source.side_file(name)

    def schedule(self, names: Sequence[str]) -> None:
        """Nothing: `hold` has said what is needed."""

    def release(self, name: str) -> None:
        """Nothing: others may need it."""

    def weight(self, name: str) -> F32:
        return self._source.weight(name)

    def rows(self, name: str, low: int, high: int) -> F32:
        return self._source.rows(name, low, high)

    def stored(self, name: str) -> tuple[U8, F32]:
        return self._source.stored(name)

    def fingerprint(self, watch: Watch = UNWATCHED) -> dict[str, dict[str, Any]]:
        return self._source.fingerprint(watch)

    def disk_bytes(self) -> int:
        return self._source.disk_bytes()

    def close(self) -> None:
        self._source.close()
