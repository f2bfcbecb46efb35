"""Processor seconds of one expert of M2.7's width in a calibrated build on the CPU, and where they go.

    python benchmarks/cpu_expert.py
    python benchmarks/cpu_expert.py --tier mq3-lloyd --rows 512 --profile 25

One thread of a pool encodes the expert as a build does: its own moment drawn toward the layer's, factors, gate and up,
what down sees of them, down's answer, and down, whose rows answer each other. Weights and inputs are random, the inputs
correlated. Time is that of the thread, so that other work on the machine matters little. `hours` are those of all
experts of the model on `--cores` cores.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from layer_pass import LAYERS, MemorySource, config
from mq_quant.awq.importance import Importance
from mq_quant.awq.own_moments import OwnMoments, whitening
from mq_quant.awq.row_answers import Sensitivity, cost_factor, row_answers
from mq_quant.formats.errors import MqError
from mq_quant.formats.minimax import expert_name
from mq_quant.quantize.encode.answering import product
from mq_quant.quantize.encode.blas import one_blas_thread
from mq_quant.quantize.encode.layer_encoder import LayerEncoder
from mq_quant.quantize.encode.prepared_layer import fit_settings
from mq_quant.quantize.spec.plan import plan_tensors
from mq_quant.quantize.spec.recipe import load_tier
from numpy.typing import NDArray

EXPERTS = 256
TOKENS = 6000


@dataclass(frozen=True)
class Layer:
    """What a calibration knows of a layer, and the rows that each expert sees."""

    gate_up: Importance
    down_pooled: NDArray[np.float64]
    rows: NDArray[np.float32]
    layer: int = 0
    notes: tuple[str, ...] = ()

    def of(self, expert: Any, projection: str = "w1") -> Any:
        """The importance of a matrix; asked without a projection, the rows of an expert."""
        if projection != "w2":
            return self.gate_up
        return Importance(np.diag(self.down_pooled).copy(), self.down_pooled, float(len(self.rows)))

    def gate_up_energy(self) -> NDArray[np.float64]:
        return self.gate_up.diagonal * self.gate_up.count


@dataclass(frozen=True)
class Kept:
    """The same rows for every expert."""

    rows: NDArray[np.float32]

    def of(self, expert: int) -> NDArray[np.float32]:
        return self.rows


def moment(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    found = (rows.T @ rows / len(rows)).astype(np.float64)
    out: NDArray[np.float64] = (found + found.T) / 2
    return out


def layer_of(source: Any, count: int, alone: bool = False) -> OwnMoments:
    """A layer whose inputs have channels of very different energy that depend on each other; those of an expert have
    other energies than those of the layer. Rows of down answer each other as if gradients were like inputs, unless each
    is rounded `alone`.
    """
    random, hidden = np.random.default_rng(0), source.config.hidden_size
    mix = np.linalg.qr(random.standard_normal((hidden, hidden), np.float32))[0]
    mix *= np.exp(random.standard_normal(hidden, np.float32) / 2)
    tokens = random.standard_normal((TOKENS, hidden), np.float32) @ mix
    rows = tokens[:count] * np.exp(random.standard_normal(hidden, np.float32) / 2)
    above = moment(tokens)
    below = moment(product(tokens, *(source.weight(expert_name(0, 7, p)) for p in ("w1", "w3"))))
    layer: Any = Layer(Importance(np.diag(above).copy(), above, 65536.0), below, rows)
    kept: Any = Kept(rows)
    directions = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    answers = None if alone else row_answers(cost_factor(Sensitivity(moment(directions), TOKENS)))
    return OwnMoments(layer, answers, kept, whitening(above), whitening(below))


def timed(made: LayerEncoder, expert: int, source: Any, profile: cProfile.Profile | None) -> float:
    """Seconds of this thread that an expert takes; a profile, where there is one, says where they go."""
    began = time.thread_time()
    if profile is not None:
        profile.enable()
    ((done,),) = LayerEncoder.encode_together([made], [expert], source)
    if profile is not None:
        profile.disable()
    if isinstance(done, MqError):
        raise done
    return time.thread_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tier", action="append", help="default: mq2 and mq3-lloyd")
    parser.add_argument("--rows", type=int, default=2048, help="tokens that the expert saw, at most 6000")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=16)
    parser.add_argument(
        "--profile", type=int, default=0, help="print so many functions that take the most time"
    )
    parser.add_argument("--alone", action="store_true", help="rows of down do not answer each other")
    args = parser.parse_args()
    source: Any = MemorySource(config(1, 8))
    shape = source.config
    layer = layer_of(source, args.rows, args.alone)
    for tier in args.tier or ["mq2", "mq3-lloyd"]:
        recipe = load_tier(tier)
        formats = {spec.name: spec.format for spec in plan_tensors(recipe, shape)}
        used = {p: formats[expert_name(0, 0, p)] for p in ("w1", "w2", "w3")}
        with one_blas_thread():
            made = LayerEncoder(shape, 0, layer, used, fit_settings(recipe))
            made.prepare({name: source.weight(name) for name in made.needs_samples()})
            profile = cProfile.Profile(time.thread_time)
            with ThreadPoolExecutor(1) as pool:  # a thread's memory is not that of the main thread
                spent = []
                for expert in range(args.repeats + 1):
                    watched = profile if args.profile and expert == args.repeats else None
                    spent.append(pool.submit(timed, made, expert, source, watched).result())
        best = min(spent[1:])
        hours = best * EXPERTS * LAYERS / args.cores / 3600
        print(json.dumps({"tier": tier, "thread_seconds": round(best, 2), "hours": round(hours, 2)}))
        if args.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(args.profile)


if __name__ == "__main__":
    main()
