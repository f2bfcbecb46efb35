"""The kernels as text: their modules, sources with our includes put in place, and every kernel's signature.

A kernel's arguments are stated in its source alone: signatures are read from KERNEL lines, launches are checked against
them, and the CPU build asserts that the compiler reads them the same way. Some headers are no files: they are made from
tables in Python, so that kernels and host share every number.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...formats.blocks import BY_NAME
from ...formats.errors import BackendError

FOLDER = Path(__file__).parents[1]
"""The room of kernels: its shelves hold the .hip files and the headers they share, each under a name of its own."""
INCLUDE = Path(__file__).parent / "include"
"""What stands in for the vendors' headers, a folder for each."""
HEADERS: Mapping[str, str] = {
    "block_table.h": ".block_table",
    "encode_constants.h": "..encode.geometry",
    "forward_constants.h": "..forward.geometry",
}
"""Headers that are made, each by a module: `header()` is the text, and `CONSTANTS` are the numbers in it by name."""
SCALARS = {"int": "int32", "int64_t": "int64", "float": "float32"}
POINTERS = {
    "float*": "float32",
    "uint8_t*": "uint8",
    "uint16_t*": "uint16",
    "int32_t*": "int32",
    "int64_t*": "int64",
    "uint32_t*": "uint32",
    "double*": "float64",
}
_BOOKS = ("MQ2-Lloyd", "MQ3-Lloyd")
_GRIDS = ("MQ4", "MQ6")
PER_FORMAT: Mapping[str, tuple[str, ...]] = {
    "matrix.hip": tuple(BY_NAME),
    "encode_kmeans.hip": _BOOKS,
    "encode_affine.hip": _GRIDS,
    "encode_fit.hip": _BOOKS + _GRIDS,
    "encode_codes.hip": _BOOKS + _GRIDS,
}
"""Sources that are built once per block format, with their formats."""
_KERNEL = re.compile(
    r"^KERNEL\((\w+)\)\s*(\w+)\(([^)]*)\) \{(.*?)(?=^\}|^KERNEL|\Z)", re.MULTILINE | re.DOTALL
)
_AWAIT = re.compile(r"\bawait_\w+")
_PARAMETER = re.compile(r"(const\s+)?(\w+)\s*(\*?)\s*(?:__restrict__\s+)?(\w+)")
_INCLUDE = re.compile(r'^#include "([\w.]+)"[^\n]*\n', re.MULTILINE)


@dataclass(frozen=True)
class Parameter:
    """One argument: its name, its C type, the dtype of the scalar or buffer, and whether the kernel writes it."""

    name: str
    ctype: str
    dtype: np.dtype[Any]
    pointer: bool
    written: bool


@dataclass(frozen=True)
class Module:
    """One compiled unit: a .hip file, built for one format where its kernels are templates over it."""

    file: str
    format: str | None = None

    @property
    def label(self) -> str:
        return f"{self.file}:{self.format}" if self.format else self.file

    @property
    def defines(self) -> tuple[str, ...]:
        return (f"FORMAT={self.format.replace('-', '_')}",) if self.format else ()


@dataclass(frozen=True, eq=False)
class Kernel:
    """One kernel of one module. `threads` is the largest block that it may run in.

    `early` holds the types of the buffers that it reads before it awaits the kernel before it, if it does.

    Kernels are compared by identity, which makes them quick keys.
    """

    module: Module
    name: str
    threads: int
    parameters: tuple[Parameter, ...]
    early: frozenset[np.dtype[Any]] | None = None

    @property
    def label(self) -> str:
        return f"{self.name}[{self.module.format}]" if self.module.format else self.name

    @cached_property
    def written(self) -> frozenset[np.dtype[Any]]:
        """The types of the buffers that it writes."""
        return frozenset(p.dtype for p in self.parameters if p.written)


@dataclass(frozen=True)
class Sources:
    """The .hip files below a folder and the headers they share.

    `per_format` names the files that are built once per block format, with the formats. A header that the folder lacks
    is read from our own room.
    """

    folder: Path = FOLDER
    per_format: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: PER_FORMAT)

    def path(self, file: str) -> Path:
        """Where a source or header of that name is: below the folder, else among our own."""
        return self._paths.get(file, self.folder / file)

    @cached_property
    def _paths(self) -> dict[str, Path]:
        """Every file by its name."""
        return {path.name: path for folder in (FOLDER, self.folder) for path in folder.rglob("*")}

    def text(self, file: str) -> str:
        """The source of a module with our own headers in place, each once."""
        seen: set[str] = set()

        def insert(match: re.Match[str]) -> str:
            if match[1] in seen:
                return ""
            seen.add(match[1])
            return _INCLUDE.sub(insert, self._read(match[1]).replace("#pragma once\n", ""))

        return _INCLUDE.sub(insert, self._read(file))

    def _read(self, file: str) -> str:
        if file in HEADERS:
            return str(_maker(file).header())
        path = self.path(file)
        try:
            return path.read_text(encoding="utf-8")
        except OSError as e:
            raise BackendError(f"a kernel source cannot be read: {e.strerror}", file=path) from None

    @cached_property
    def kernels(self) -> dict[tuple[str, str | None], Kernel]:
        """Every kernel by (name, format name or None)."""
        found: dict[tuple[str, str | None], Kernel] = {}
        for path in sorted(self.folder.rglob("*.hip"), key=lambda path: path.name):
            formats: tuple[str | None, ...] = self.per_format.get(path.name, (None,))
            for name, threads, parameters, early in signatures(self._read(path.name), path):
                for fmt in formats:
                    if (name, fmt) in found:
                        raise BackendError(f"kernel {name} is defined twice", file=path)
                    found[name, fmt] = Kernel(Module(path.name, fmt), name, threads, parameters, early)
        return found

    def kernel(self, name: str, fmt: str | None = None) -> Kernel:
        """The kernel of that name, for a block format where it is built per format; else BackendError."""
        try:
            return self.kernels[name, fmt]
        except KeyError:
            wanted = f"{name} for format {fmt}" if fmt else name
            raise BackendError(f"there is no kernel {wanted}", file=self.folder) from None

    def modules(self) -> dict[Module, tuple[Kernel, ...]]:
        """Every module with its kernels, in a fixed order."""
        out: dict[Module, tuple[Kernel, ...]] = {}
        for kernel in self.kernels.values():
            out[kernel.module] = (*out.get(kernel.module, ()), kernel)
        return out


@cache
def our_sources() -> Sources:
    """The kernels of this package, read once for all back ends."""
    found = Sources()
    assert found.kernels
    return found


def _maker(header: str) -> Any:
    return importlib.import_module(HEADERS[header], __package__)


def _threads(text: str, file: Path) -> int:
    """The number that KERNEL(text) states: digits, or a name of one of the headers that are made."""
    named: dict[str, Any] = {}
    for header in HEADERS:
        named |= _maker(header).CONSTANTS
    try:
        return int(named.get(text, text))
    except ValueError:
        raise BackendError(f"no header gives the number of threads {text!r}", file=file) from None


def signatures(
    text: str, file: Path
) -> list[tuple[str, int, tuple[Parameter, ...], frozenset[np.dtype[Any]] | None]]:
    """(name, block size, parameters, types read before it awaits) of every KERNEL; BackendError for a type outside
    the tables.
    """
    found = []
    for match in _KERNEL.finditer(text):
        parameters = tuple(_parameter(p, file) for p in match[3].split(","))
        found.append((match[2], _threads(match[1], file), parameters, _early(match[4], parameters)))
    return found


def _early(body: str, parameters: Sequence[Parameter]) -> frozenset[np.dtype[Any]] | None:
    """The types of the buffers to read that a body names before it last awaits; None where it never does."""
    if not (awaits := list(_AWAIT.finditer(body))):
        return None
    named = set(re.findall(r"(?<!\.)\b\w+", body[: awaits[-1].start()]))
    return frozenset(p.dtype for p in parameters if p.pointer and not p.written and p.name in named)


def _parameter(text: str, file: Path) -> Parameter:
    match = _PARAMETER.fullmatch(text.strip())
    base = match[2] + match[3] if match else ""
    dtype = (POINTERS if base.endswith("*") else SCALARS).get(base)
    if match is None or dtype is None:
        raise BackendError(
            f"kernel argument {text.strip()!r} has a type that launches cannot check", file=file
        )
    const, pointer = bool(match[1]), base.endswith("*")
    return Parameter(
        match[4], f"const {base}" if const else base, np.dtype(dtype), pointer, pointer and not const
    )
