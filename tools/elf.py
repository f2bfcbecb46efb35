"""What the compile check reads of ELF64 files: machine, flags, sections and symbols. Depends on errors only."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from mq_quant.formats.errors import CheckError

DYNSYM, PROGBITS, SYMTAB = 11, 1, 2


@dataclass(frozen=True)
class Symbol:
    """A name, the number of its section, 0 where it is not defined, and in code that is loaded, where it lies there."""

    name: str
    section: int
    value: int

    @property
    def defined(self) -> bool:
        return self.section != 0


@dataclass(frozen=True)
class Section:
    """One section; `symbols` are those of a symbol table, else empty. `size` counts sections without content too."""

    name: str
    kind: int
    size: int
    content: bytes
    symbols: tuple[Symbol, ...]


@dataclass(frozen=True)
class Elf:
    """A little-endian ELF64 file; `machine` and `flags` are e_machine and e_flags."""

    machine: int
    flags: int
    sections: tuple[Section, ...]

    def section(self, name: str) -> Section | None:
        """The first section of that name."""
        return next((s for s in self.sections if s.name == name), None)


def read_elf(data: bytes) -> Elf:
    """Parse an ELF64 file; CheckError where it is none or cut short."""
    if data[:5] != b"\x7fELF\x02" or len(data) < 64:
        raise CheckError("the compiler's output is not an ELF64 file")
    try:
        return _read(data)
    except (struct.error, ValueError, IndexError):
        raise CheckError("the compiler's output is a broken ELF64 file") from None


def _read(data: bytes) -> Elf:
    machine, flags = struct.unpack_from("<H", data, 18)[0], struct.unpack_from("<I", data, 48)[0]
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]

    def text(section: int, offset: int) -> str:
        start = headers[section][4] + offset
        return data[start : data.index(b"\0", start)].decode()

    def symbols(header: tuple[int, ...]) -> tuple[Symbol, ...]:
        entries = (struct.unpack_from("<IBBHQ", data, header[4] + at) for at in range(0, header[5], 24))
        return tuple(Symbol(text(header[6], name), index, value) for name, _, _, index, value in entries)

    return Elf(
        machine,
        flags,
        tuple(
            Section(
                text(names, h[0]),
                h[1],
                h[5],
                data[h[4] : h[4] + h[5]],
                symbols(h) if h[1] in (DYNSYM, SYMTAB) else (),
            )
            for h in headers
        ),
    )
