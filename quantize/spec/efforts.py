"""What each effort takes before anything starts: hours, memory, disk and downloads, for a model on this machine.

Hours follow from counts of multiply-adds and from rates that were measured (docs/speed.md), so they are right to about
a factor of 1.5 on other processors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from ...formats.minimax import ModelConfig
from .calibration_sizes import SENSITIVITY_TOKENS, inline_sizes, usual_tokens
from .recipe import Effort, Recipe

EPOCHS = 6
"""How often tuning goes through the tokens."""
NIGHT = 12.0
"""Hours: an effort that takes longer is no machine's default."""


@dataclass(frozen=True)
class Rates:
    """What one core, or one GPU with its cores, does in a second.

    Multiply-adds of products in f32 and of products and factorisations in f64; weights rounded under an imatrix and
    under moments, whole rows twice; multiply-adds of training, in which matrices are dequantised on the way.
    """

    f32: float
    f64: float
    by_imatrix: float
    by_moments: float
    training: float


CPU_CORE = Rates(f32=6.0e10, f64=2.5e10, by_imatrix=16e6, by_moments=3.8e6, training=1.6e10)
"""Measured on one core of an AMD EPYC with AVX-512: rounding at M2.7's width (`python benchmarks/cpu_expert.py`),
training on a model of 47 million weights.
"""
GPU = Rates(f32=3.2e13, f64=5e13, by_imatrix=1.9e9, by_moments=5.0e8, training=2.8e13)
"""Measured on one NVIDIA H200 at M2.7's width, on 65,536 and 524,288 tokens: `python benchmarks/layer_pass.py` and
`benchmarks/tune_layer.py`.
"""


@dataclass(frozen=True)
class EffortCost:
    """What a build of one effort takes besides its file. `download_bytes` is None where the source lies here."""

    effort: Effort
    tokens: int
    hours: float
    memory_bytes: int
    disk_bytes: int
    download_bytes: int | None
    default: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Share:
    """How much of a build several tiers have in common: the number of tiers, and in how many ways their gate and up are
    rounded, their down, and both together, in the mean of all layers.
    """

    tiers: int = 1
    gate_up: float = 1
    down: float = 1
    pairs: float = 1

    @classmethod
    def of(cls, formats: Sequence[Sequence[tuple[str, str]]]) -> Share:
        """Of tiers with these formats of gate and up, and of down, layer by layer."""
        layers = list(zip(*formats, strict=True))
        gate_up, down = (mean(len({pair[i] for pair in layer}) for layer in layers) for i in (0, 1))
        return cls(len(formats), gate_up, down, mean(len(set(layer)) for layer in layers))


ALONE = Share()
"""One tier."""


def expert_weights(config: ModelConfig) -> int:
    """Weights of all experts of all layers."""
    per_expert = 3 * config.hidden_size * config.intermediate_size
    return per_expert * config.num_local_experts * config.num_hidden_layers


def gather_products(config: ModelConfig, tokens: int) -> tuple[float, float]:
    """Multiply-adds in f32 and f64 of running the model on tokens and gathering the moments that layers share."""
    h, i, k = config.hidden_size, config.intermediate_size, config.num_experts_per_tok
    attention = h * (2 * config.q_dim + 2 * config.kv_dim)
    forward = tokens * (attention + 3 * k * h * i)
    shared = tokens * (h * h + k * i * i)
    return float(config.num_hidden_layers * forward), float(config.num_hidden_layers * shared)


def own_products(config: ModelConfig, tokens: int, share: Share = ALONE) -> tuple[float, float]:
    """Multiply-adds in f32 and f64 of experts' own moments, their factors, and down's answer.

    Those at down follow from what the rounded gate and up give, so they are done for each way of rounding these. Half
    of a product is made where its result is symmetric or a matrix triangular; a factor or an inverse takes K³ / 6.
    """
    h, i, e = config.hidden_size, config.intermediate_size, config.num_local_experts
    rows, below = tokens * config.num_experts_per_tok, share.gate_up
    moments = rows * (h * h / 2 + 2 * i * i * below + 2 * h * i * (1 + below))
    shares = e * min(1024, rows / e) * (h * h + below * i * i)
    f32 = moments + shares + e * (h**3 / 6 + below * (7 / 6 * i**3 + i * i * h))
    f64 = e * (h**3 / 6 + below * i**3 / 3)
    return float(config.num_hidden_layers * f32), float(config.num_hidden_layers * f64)


def sensitivity_products(config: ModelConfig, tokens: int) -> float:
    """Multiply-adds in f32 of running the source forward and back: the way back takes its forward pass once more."""
    forward, _ = gather_products(config, min(tokens, SENSITIVITY_TOKENS))
    return 3 * forward


def training_products(config: ModelConfig, tokens: int) -> float:
    """Multiply-adds in f32 of tuning: each epoch once forward and twice back, and three times forward to judge."""
    forward, _ = gather_products(config, tokens)
    return (3 * EPOCHS + 3) * forward


def hours(
    config: ModelConfig,
    effort: Effort,
    tokens: int,
    cores: int,
    device: str = "cpu",
    share: Share = ALONE,
    sensitive: bool = False,
) -> float:
    """Hours of a build on so many cores, or on one GPU, reading and writing left out; `share` is that of tiers that are
    built in one pass. A `sensitive` one finds first what errors behind each layer cost.

    Under an imatrix down is rounded in as many ways as it has formats; under moments each way follows from that of gate
    and up too.
    """
    rates, cores = (CPU_CORE, cores) if device == "cpu" else (GPU, 1)
    down = share.down if effort == "imatrix" else share.pairs
    weights = expert_weights(config) * (2 * share.gate_up + down) / 3
    if effort == "imatrix":
        return weights / (rates.by_imatrix * cores) / 3600
    gathered, own = gather_products(config, tokens), own_products(config, tokens, share)
    products = (gathered[0] + own[0]) / rates.f32 + (gathered[1] + own[1]) / rates.f64
    if sensitive:
        products += sensitivity_products(config, tokens) / rates.f32
    training = share.tiers * training_products(config, tokens)
    trained = training / rates.training if effort == "tuned" else 0.0
    return (products + weights / rates.by_moments + trained) / cores / 3600


def measuring_hours(
    config: ModelConfig,
    effort: Effort,
    tokens: int,
    judged: int,
    formats: int,
    cores: int,
    device: str = "cpu",
    sensitive: bool = False,
) -> float:
    """Hours of measuring each piece in so many formats on `judged` tokens: all experts are rounded in each format, down
    twice, and every piece has a stream that passes all later layers and the head. A `sensitive` one finds first what
    errors behind each layer cost.
    """
    spent = 1.5 * formats * hours(config, effort, tokens, cores, device)
    rates, workers = (CPU_CORE, cores) if device == "cpu" else (GPU, 1)
    if sensitive:
        spent += sensitivity_products(config, tokens) / rates.f32 / workers / 3600
    streams = formats * config.num_hidden_layers
    forward, _ = gather_products(config, judged)
    heads = 2.0 * streams * judged * config.vocab_size * config.hidden_size
    return spent + (streams * forward + heads) / rates.f32 / workers / 3600


def default_effort(recipe: Recipe, config: ModelConfig, cores: int, device: str = "cpu") -> Effort:
    """The recipe's own effort, else the most that this machine does in one night.

    Where the recipe names no imatrix it is `calibrated` at least: there is nothing to do less with.
    """
    if recipe.effort is not None:
        return recipe.effort
    if device != "cpu":
        return "tuned"
    if recipe.model.imatrix is None:
        return "calibrated"
    night = hours(config, "calibrated", usual_tokens(config, device), cores) <= NIGHT
    return "calibrated" if night else "imatrix"


def effort_costs(
    config: ModelConfig,
    cores: int,
    memory: Mapping[Effort, int],
    download: int | None,
    default: Effort,
    device: str = "cpu",
    share: Share = ALONE,
) -> tuple[EffortCost, ...]:
    """One row per effort on so many cores or on one GPU; `memory` is what each effort takes besides gathering."""
    rows = []
    for effort, most in memory.items():
        tokens = 0 if effort == "imatrix" else usual_tokens(config, device)
        tuned = share.tiers if effort == "tuned" else 0
        here = download is None
        sizes = inline_sizes(config, tokens, most, tuned, ahead=int(device != "cpu"), sensitive=here)
        disk = sizes.disk_bytes if tokens else 0
        used = sizes.memory_bytes if tokens else most
        spent = round(hours(config, effort, tokens, cores, device, share, here), 2)
        rows.append(EffortCost(effort, tokens, spent, used, disk, download, effort == default))
    return tuple(rows)
