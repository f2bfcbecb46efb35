"""Parts of the released model's size are merged, as files of holes, so that no disk has to hold them.

Run `python benchmarks/merge_size.py`: it writes the parts of a tier of M2.7 with true records and holes for payloads,
and merges them into a file whose space is not reserved and in which nothing is written where a part has a hole. All
else is done as ever: every byte is read back and hashed, every unit is noted and synced. `--layers` cuts the model.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import xxhash
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.machine import peak_rss
from mq_quant.formats.minimax import parse_config
from mq_quant.quantize.pipeline.merge import merge_parts
from mq_quant.quantize.pipeline.parts import LayerRange, PartLayout, sealed
from mq_quant.quantize.pipeline.work_units import file_order
from mq_quant.quantize.spec.metadata import template, totals_of
from mq_quant.quantize.spec.places import model_files
from mq_quant.quantize.spec.plan import make_plan, plan_tensors
from mq_quant.quantize.spec.recipe import load_tier
from mq_quant.quantize.write import partial_file


@dataclass(frozen=True)
class Merged:
    """A merge of parts of holes: bytes of the file and of what it takes on the disk, and what the work took."""

    units: int
    total_bytes: int
    disk_bytes: int
    seconds: float
    processor_seconds: float
    peak_rss_bytes: int


@cache
def zeros(nbytes: int) -> str:
    """The xxh64 of so many zeros."""
    return xxhash.xxh64_hexdigest(bytes(nbytes))


def hollow_parts(tier: str, layers: int, count: int, folder: Path) -> list[Path]:
    """The parts of a tier of M2.7 with so many of its layers, their payloads holes."""
    recipe = load_tier(tier)
    files = model_files(recipe.model)
    raw = {**files.config, "num_hidden_layers": layers}
    config, provenance = parse_config(raw), {"recipe": recipe.resolved()}
    tensors = plan_tensors(recipe, config)
    metadata = template(raw, files.side, config, totals_of(tensors), provenance)
    plan = make_plan(recipe, config, tensors, metadata)
    spec: Any = SimpleNamespace(plan=plan, metadata=metadata, signature={"plan": plan.digest()})
    order, paths = file_order(tensors), []
    for n in range(count):
        part = PartLayout.of(spec, order, LayerRange.parse(None, f"{n + 1}/{count}", layers))
        done = {u.key: {"unit": u.key, "xxh64": zeros(u.nbytes)} for u in part.units}
        before, after = sealed(spec, part, done, [], None)
        paths.append(folder / f"part-{n + 1}")
        with paths[-1].open("wb") as file:
            file.write(before)
            file.truncate(part.total_bytes)
            file.seek(part.total_bytes)
            file.write(after)
    return paths


def copied_holes(source: int, target: int, count: int, offset: int, at: int) -> int:
    """What copying holes comes to where they stay holes; bytes at the edge of one are copied."""
    piece = os.pread(source, 1 << 16, offset)[:count]
    if any(piece):
        os.pwrite(target, piece, at)
        return len(piece)
    return count


def merge_of(tier: str, layers: int, count: int, folder: Path) -> Merged:
    """Write the parts into a folder and merge them there."""
    paths = hollow_parts(tier, layers, count, folder)
    began, before = time.monotonic(), time.process_time()
    with (
        patch.object(partial_file, "_reserve", lambda *_: None),
        patch.object(partial_file, "free_bytes", lambda _: None),
        patch.object(partial_file, "copy_range", copied_holes),
    ):
        result = merge_parts(paths, folder / "merged")
    spent, processor = time.monotonic() - began, time.process_time() - before
    with open_hfq(result.path) as file:
        assert len(file.entries) == result.tensor_count
    held = result.path.stat().st_blocks * 512
    return Merged(result.units, result.total_bytes, held, spent, processor, peak_rss())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tier", default="mq4")
    parser.add_argument("--layers", type=int, default=62)
    parser.add_argument("--parts", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path()) as folder:
        print(merge_of(given.tier, given.layers, given.parts, Path(folder)))


if __name__ == "__main__":
    main()
