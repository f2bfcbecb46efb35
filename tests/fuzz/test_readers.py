"""Changed files against every reader: whatever the bytes, only errors of ours come out, and memory stays bounded.

The number of inputs is small here; `tools/fuzz_readers.py` runs a campaign of as many as one likes.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_targets import TARGETS, input_of
from mq_quant.formats.errors import MqError

INPUTS = 150
MEMORY = 1 << 30


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """Any reader that asks for another GiB gets a MemoryError, which is no error of ours."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("name", TARGETS)
def test_the_good_file_is_taken(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    (tmp_path / target.file).write_bytes(target.make(tmp_path))
    target.read(tmp_path)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.usefixtures("bounded_memory")
def test_only_our_errors(name: str, tmp_path: Path) -> None:
    target, refused = TARGETS[name], 0
    seed = target.make(tmp_path)
    for number in range(INPUTS):
        (tmp_path / target.file).write_bytes(input_of(name, number, seed))
        try:
            target.read(tmp_path)
        except MqError as e:
            refused += 1
            assert str(e).replace("\n", "").isprintable()
    assert refused
