"""The source's run of one layer at the full width of MiniMax-M2.7, alone: on one GPU, then on all of its kind.

    python benchmarks/source_layer.py                              # 65,536 tokens
    python benchmarks/source_layer.py --sequences 1024             # 524,288 tokens
    python benchmarks/source_layer.py --device cpu --experts 4 --sequences 2   # a look on the CPU, as two devices

A row for each run: seconds of what comes before the experts, which is attention, the router and the moment that all
experts share; of the experts; and of what is left to do for the moments. And the most memory that each GPU took. The
weights lie on the devices before. The first run of each kind loads kernels and takes memory. At the end it says whether
the bits are the same.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from layer_pass import VOCAB, MemorySource, config
from mq_quant.formats.minimax import layer_inventory
from mq_quant.quantize.calibrate.layer_pass import beside_others, device_weights, open_device, with_others
from mq_quant.quantize.calibrate.moments import LayerMoments
from mq_quant.verify.model.reference import Routing, embed
from mq_quant.verify.model.spread_forward import EXPERTS, spread_forward
from torch import Tensor

STEPS = ("before_experts", "experts", "moments")


def finished(devices: Sequence[torch.device]) -> float:
    """The time at which devices have done all that they were asked for."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.monotonic()


class Timed(LayerMoments):
    """Moments that note when the experts may begin."""

    def __init__(self, given: MemorySource, devices: Sequence[torch.device]) -> None:
        super().__init__(given.config, 0, "pooled", keep_rows=True, at_once=EXPERTS * len(devices))
        self.devices, self.marks = devices, [finished(devices)]

    def routed(self, layer: int, inputs: Tensor, routing: Routing) -> None:
        super().routed(layer, inputs, routing)
        self.marks.append(finished(self.devices))


def run(
    source: MemorySource, devices: Sequence[torch.device], hidden: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """The stream behind the layer and its moments; prints a row."""
    weights = device_weights(source, devices, 0)
    for spec in layer_inventory(source.config, 0):
        if spec.stored == "fp8":
            weights.matrix(spec.name)
    gpus = [device for device in devices if device.type == "cuda"]
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    moments = Timed(source, devices)
    with torch.inference_mode():
        behind = spread_forward(weights, source.config, 0, hidden, moments)
        moments.marks.append(finished(devices))
        arrays = moments.finish()
    moments.marks.append(finished(devices))
    weights.close()
    seconds = [later - earlier for earlier, later in pairwise(moments.marks)]
    row = {"devices": len(devices), **dict(zip(STEPS, seconds, strict=True)), "all": sum(seconds)}
    row["gib"] = [torch.cuda.max_memory_allocated(gpu) / 2**30 for gpu in gpus]
    print(json.dumps(row, default=float))
    return behind, dict(arrays)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--runs", type=int, default=2)
    args = parser.parse_args()
    source, device = MemorySource(config(1, args.experts)), open_device(args.device)
    everything = with_others(device) if args.device == "cuda" else (device, device)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (args.sequences, args.length))
    hidden = embed(source, tokens).to(device)
    with beside_others(everything)():
        one, all_of_them = (
            [run(source, devices, hidden) for _ in range(args.runs)][-1]
            for devices in ((device,), everything)
        )
    same = all((one[1][name] == all_of_them[1][name]).all() for name in one[1])
    print(json.dumps({"same_stream": torch.equal(one[0], all_of_them[0]), "same_moments": bool(same)}))


if __name__ == "__main__":
    main()
