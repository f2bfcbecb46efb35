"""Writes the quantization hash of every tier of the tiny source into its recipe, and its layers' hashes: `make hashes`.

For use after a change that is meant to alter bytes; the tests rebuild the tiers and compare. Run it as
`python tools/tiny_hashes.py`.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from mq_quant.formats.machine import cores
from mq_quant.quantize.inspect.regenerate import regenerated_from, write_table
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.spec.layer_hashes import FILE
from mq_quant.quantize.spec.places import TINY
from mq_quant.quantize.spec.recipe import bundled_file, bundled_path, load_tier, tiers

_LINE = re.compile(r"^quantization_hash: .*\n", re.MULTILINE)


def tiny_hash(tier: str, folder: Path, jobs: int) -> str:
    """Build one tier of the tiny source in `folder` and return its quantization hash."""
    options = RunOptions(folder / f"{TINY}.{tier}", jobs, force=True)
    return build_file(load_tier(tier, TINY), options=options).quantization_hash


def main() -> None:
    layers = bundled_file(TINY, FILE)
    with tempfile.TemporaryDirectory() as folder:
        for tier in tiers(TINY):
            value = tiny_hash(tier, Path(folder), cores())
            path = bundled_path(tier, TINY)
            path.write_text(_LINE.sub("", path.read_text()) + f"quantization_hash: '{value}'\n")
            print(f"{tier:10} {value}")
        built = [Path(folder) / f"{TINY}.{tier}" for tier in tiers(TINY)]
        layers.unlink(missing_ok=True)
        write_table(regenerated_from(built, layers), layers)


if __name__ == "__main__":
    main()
