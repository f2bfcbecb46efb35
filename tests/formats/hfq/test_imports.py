"""Reading a file needs numpy and xxhash only."""

from __future__ import annotations

import subprocess
import sys

HEAVY = (
    "torch",
    "numba",
    "llvmlite",
    "scipy",
    "sklearn",
    "pydantic",
    "typer",
    "safetensors",
    "huggingface_hub",
)


def test_reading_a_file_loads_numpy_and_xxhash_only() -> None:
    code = f"""
import sys
from mq_quant.formats.hfq import HfqFile, Provenance, open_hfq
print(*(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
