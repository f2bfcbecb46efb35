"""What `mq-quant measure` takes at the full width of MiniMax-M2.7: a few layers of random FP8 weights in memory, in all
formats and calibrated, and what follows for the whole model.

    python benchmarks/measure_layers.py --device cuda                # 2 layers of 32 experts
    python benchmarks/measure_layers.py --experts 2 --sequences 1    # a look on the CPU

Experts see as many tokens as of 65,536 with 256 of them where there are half as many sequences as experts. Seconds are
those of running the source and beginning a layer, of rounding an expert in all formats and taking the streams through
it, of one stream through a later layer, and of one stream at the head, for a vocabulary of 8192. `model_hours` counts
62 layers of 256 experts and the vocabulary of M2.7 by them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from layer_pass import LAYERS, VOCAB, MemorySource, config
from mq_quant.formats.machine import peak_rss
from mq_quant.quantize.calibrate.layer_pass import EMBED
from mq_quant.quantize.encode.encoders import open_encoder
from mq_quant.quantize.fit.before import WHOLES, Texts
from mq_quant.quantize.fit.measurement import EXPERT_NAMES
from mq_quant.quantize.fit.run import MeasureOptions, losses_of
from mq_quant.quantize.fit.streams import Streams
from mq_quant.quantize.pipeline.statistics import OnTheFly
from mq_quant.quantize.spec.recipe import load_tier
from numpy.typing import NDArray

EXPERTS, VOCABULARY = 256, 200064


class Synthetic(MemorySource):
    """What a measurement asks of a source besides weights."""

    origin: dict[str, str] = {}  # noqa: RUF012

    @cached_property
    def _vocabulary(self) -> dict[str, NDArray[np.float32]]:
        return {name: self.weight(name) for name in (EMBED, "lm_head.weight")}

    def rows(self, name: str, low: int, high: int) -> NDArray[np.float32]:
        return self._vocabulary[name][low:high]

    def fingerprint(self, watch: object = None) -> dict[str, dict[str, Any]]:
        return {"memory": {"sha256": "0" * 64}}

    def disk_bytes(self) -> int:
        return 0


@dataclass
class Clock:
    """Hears of the work, and keeps the seconds that each kind of it has taken, and the most memory of the GPU."""

    device: str
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    device_bytes: int = 0
    _last: float = field(default_factory=time.monotonic)
    _layer_begins: bool = True

    def begin(self, phase: str, total: int, unit: str, done: int = 0) -> None:
        self._add("other")

    def advance(self, amount: int, doing: str = "") -> None:
        if doing.startswith("running"):
            self._add("other")
            self._layer_begins = True
        elif "expert" in doing:
            self._add("begin" if self._layer_begins else "experts")
            self._layer_begins = False
        elif "pieces" in doing:
            self._add("streams")
        elif doing:
            self._add("experts")
        else:
            self._add("head")

    def _add(self, kind: str) -> None:
        now = time.monotonic()
        self.seconds[kind] += now - self._last
        self._last = now
        if self.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            self.device_bytes = max(self.device_bytes, total - free)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=16, help="of 512 tokens, to calibrate on")
    parser.add_argument("--judged", type=int, default=8, help="sequences to compare on")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()
    source: Any = Synthetic(config(args.layers, args.experts))
    random = np.random.default_rng(1)
    calibrating, judging = (
        random.integers(0, VOCAB, (count, args.length)).astype(np.int32)
        for count in (args.sequences, args.judged)
    )
    recipe = load_tier("mq4")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"imatrix": None})})
    plan = Streams(source.config, EXPERT_NAMES, tuple((choice,) * args.layers for choice in WHOLES))
    clock = Clock(args.device)
    with tempfile.TemporaryDirectory() as folder, open_encoder(args.device) as encoder:
        options = MeasureOptions(Path(folder) / "out", args.device, args.jobs, encoder, watch=clock)
        with losses_of(recipe, source, Texts(calibrating, judging, None), OnTheFly(), plan, options) as found:
            numbers = report(args, clock, len(found.divergences))
    print(json.dumps(numbers, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(numbers))


def report(args: argparse.Namespace, clock: Clock, streams: int) -> dict[str, Any]:
    """What was measured, and what follows for M2.7 with as many tokens for each expert."""
    spent, departing = clock.seconds, 2 * len(EXPERT_NAMES)
    passed = departing * args.layers * (args.layers - 1) // 2
    a_layer = spent["begin"] / args.layers
    an_expert = spent["experts"] / (args.layers * args.experts - args.layers)
    a_stream, at_head = spent["streams"] / max(1, passed), spent["head"] / streams
    model = LAYERS * (a_layer + EXPERTS * an_expert)
    model += departing * LAYERS * (LAYERS - 1) / 2 * a_stream
    model += (departing * LAYERS + streams - departing * args.layers) * at_head * VOCABULARY / VOCAB
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "jobs": args.jobs,
        "experts": args.experts,
        "tokens": int(args.sequences * args.length),
        "judged": int(args.judged * args.length),
        "begin_layer": a_layer,
        "expert": an_expert,
        "stream": a_stream,
        "head": at_head,
        "model_hours": model / 3600,
        "device_gib": clock.device_bytes / 2**30,
        "memory_gib": peak_rss() / 2**30,
    }


if __name__ == "__main__":
    main()
