"""numba's compiler for the loops of this project, with a cache of machine code that is checked before it is loaded.

A compiled function holds the code of those that it calls, and numba's own cache looks only at the file of the function
itself: after an upgrade it could run old code for new sources, and write other bytes. That cache also loads whatever
lies in its folder, and fails where no folder can be written. Here the name of a file holds the digest of all sources
that may be part of it, and `formats.cache` keeps it.
"""

from __future__ import annotations

import hashlib
import pickle
import platform
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import _Cache as CacheInterface
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from . import cache as disk
from .machine import variable

KIND = "loops"
serialized: Any = dumps


def compiler(*sources: Path, inlined: bool = False) -> Callable[[Any], Any]:
    """A decorator that compiles a function when it is first called, and releases the interpreter's lock while it runs.

    `sources` are the files, and the folders of files, that the compiled code may come from. An `inlined` function
    becomes part of the code of each caller, and counts no references to arrays: its caller holds those that it is
    given, and it makes none.
    """

    # Both are said in either case: what is not said is taken over from the caller that is compiled at the time.
    options: dict[str, Any] = {"forceinline": inlined, "_nrt": not inlined}

    def compiled(function: Any) -> Any:
        dispatcher: Any = numba.njit(nogil=True, **options)(function)
        dispatcher._cache = MachineCode(function, sources)
        return dispatcher

    return compiled


@cache
def identity(sources: tuple[Path, ...]) -> str:
    """A digest of all sources, with nested ones, and of the compiler."""
    digest = hashlib.sha256()
    for text in (numba.__version__, llvmlite.__version__, platform.python_version()):
        digest.update(f"{text}\n".encode())
    for path in sorted(_files(sources)):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _files(sources: tuple[Path, ...]) -> Iterator[Path]:
    for source in sources:
        yield from source.rglob("*.py") if source.is_dir() else (source,)


@cache
def folder() -> Path | None:
    """Where machine code is kept; None where nothing can be written."""
    given = variable("NUMBA_CACHE_DIR")
    if given and Path(given).is_absolute():
        place = Path(given) / disk.NAME
        if disk.private(place) and disk.private(place / KIND):
            return place / KIND
    return disk.folder(KIND)


class MachineCode(CacheInterface):
    """What numba asks for code before it compiles, and gives it to afterwards: one function, a file per signature."""

    def __init__(self, function: Any, sources: tuple[Path, ...]) -> None:
        self._function = function
        self._sources = sources

    @property
    def cache_path(self) -> Any:
        return folder()

    def path(self, signature: Any, target: Any) -> Path | None:
        """The file of a signature (a tuple of numba types), for the processor of `target`, numba's code generator."""
        place = folder()
        if place is None:
            return None
        code = self._function.__code__
        name = f"{self._function.__module__}.{self._function.__qualname__}"
        parts = (identity(self._sources), name, str(signature), str(target.magic_tuple()), code.co_code.hex())
        return place / f"{name[-80:]}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:40]}.nbc"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function, or None where it has to be compiled."""
        target_context.refresh()
        path = self.path(sig, target_context.codegen())
        content = disk.read(path) if path else None
        rebuild: Any = CompileResult._rebuild
        return rebuild(target_context, *pickle.loads(content)) if content else None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function, where that can be done."""
        if any(not lifted.can_cache for lifted in data.lifted) or data.library.has_dynamic_globals:
            return
        path = self.path(sig, data.codegen)
        if path is not None:
            with suppress(OSError):
                disk.write(path, serialized(data._reduce()))

    def enable(self) -> None:
        """Always so."""

    def disable(self) -> None:
        """Never so."""

    def flush(self) -> None:
        """Files are named after their content, and need not be removed."""
