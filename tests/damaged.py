"""A finished file in which a bit has turned."""

from __future__ import annotations

from pathlib import Path

from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.hfq.checked import checksum, stated_checksums


def flip_bit(path: Path, tensor: str, at: int = 0) -> None:
    """Turn one bit of a tensor's payload."""
    with open_hfq(path) as file:
        offset = file.entry(tensor).offset
    with path.open("r+b") as f:
        f.seek(offset + at)
        byte = f.read(1)[0]
        f.seek(offset + at)
        f.write(bytes([byte ^ 1]))


def resign(path: Path) -> None:
    """Let a file state the checksums that its payloads have now, as a program that writes what is wrong would."""
    with open_hfq(path) as file:
        stated = "".join(stated_checksums(file).values())
        found = "".join(checksum(file.chunks(entry)) for entry in file.entries)
    path.write_bytes(path.read_bytes().replace(stated.encode(), found.encode(), 1))
