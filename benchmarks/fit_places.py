"""What the exact search finds at the sizes of the tiers, by the losses of measurements, and in deeper models.

    python benchmarks/fit_places.py measurement.json …

For each measurement and tier: by how much the least sum of losses in the tier's bytes is below the tier's sum. No other
choice of formats in these bytes has a smaller sum, so 0 means that the tier is the best by these losses; in brackets
where the tier is kept all the same, since the difference is within the doubt. Then the same, on average, for models of
12 and 62 layers that lose as the measured one: each piece as one of the measured model of about its depth, times a
factor whose logarithm has the deviation `--spread`, and each format times another one of a tenth of that. Last, what is
lost where formats are chosen by the losses of another measurement of the model. Seconds on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
from mq_quant.formats.minimax import ModelConfig, parse_config
from mq_quant.quantize.fit.allocation import allocation_of
from mq_quant.quantize.fit.budget import Budget
from mq_quant.quantize.fit.fitted import Fitted, Fitting
from mq_quant.quantize.fit.losses import Losses, measured
from mq_quant.quantize.fit.measurement import Measurement, read_measurement
from mq_quant.quantize.spec.places import model_files
from mq_quant.quantize.spec.recipe import load_tier, tiers
from mq_quant.quantize.spec.tally import file_sizes

DEPTHS, DRAWS, BUDGETS = (12, 62), 10, 12
STANDARD = {name: load_tier(name) for name in tiers()}
FILES = replace(model_files(STANDARD["mq2"].model), complete=True)


def config_of(found: Measurement, layers: int | None = None) -> ModelConfig:
    """M2.7's, with the dimensions of the measured model that decide the bytes of pieces, and so many layers."""
    model = found.model
    return replace(
        parse_config(FILES.config),
        num_hidden_layers=layers or model.layers,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_local_experts=model.experts,
        vocab_size=model.vocabulary,
    )


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """The bytes of the standard tiers, the smallest first."""
    sizes = {name: file_sizes(recipe, FILES, config).total_bytes for name, recipe in STANDARD.items()}
    return dict(sorted(sizes.items(), key=lambda item: item[1]))


def fitted(config: ModelConfig, losses: Losses, size: int) -> Fitted:
    return Fitting(STANDARD, FILES, config, Budget("size", Decimal(size), f"{size}B"), losses).best()


def at_tiers(config: ModelConfig, losses: Losses) -> dict[str, tuple[float, bool]]:
    """Of each tier, what the least sum in its bytes is below its own, and whether it is kept."""
    free, out = replace(losses, doubt=0.0, rest=0.0), {}
    for name, size in sizes_of(config).items():
        own = losses.total(allocation_of(STANDARD[name], config))
        least = losses.total(fitted(config, free, size).allocation)
        out[name] = 1 - least / own, fitted(config, losses, size).tier == name
    return out


def deeper(losses: Losses, layers: int, spread: float, random: np.random.Generator) -> Losses:
    """Losses of a model of so many layers whose pieces lose as those of the measured one."""
    measured_layers, pieces = len(losses.pieces) // 2, []
    for piece in range(2 * layers):
        layer, projection = divmod(piece, 2)
        like = losses.pieces[2 * (layer * measured_layers // layers) + projection]
        factor = np.exp(random.normal(0, spread))
        own = np.exp(random.normal(0, spread / 10, len(like)))
        pieces.append({name: loss * factor * of for (name, loss), of in zip(like.items(), own, strict=True)})
    return Losses(tuple(pieces), "random", losses.rest * layers / measured_layers, doubt=losses.doubt)


def rows(path: Path, spread: float) -> Iterator[str]:
    """The lines of the table that are about one measurement."""
    found = read_measurement(path)
    losses, random = measured(found), np.random.default_rng(0)
    cells = [
        f"({gain:.1%})" if kept and gain > 0 else f"{gain:.1%}"
        for gain, kept in at_tiers(config_of(found), losses).values()
    ]
    yield f"| {path.stem} | {found.model.layers} | {' | '.join(cells)} |"
    for layers in DEPTHS:
        config = config_of(found, layers)
        drawn = [at_tiers(config, deeper(losses, layers, spread, random)) for _ in range(DRAWS)]
        means = (np.mean([each[name][0] for each in drawn]) for name in drawn[0])
        yield f"| {path.stem} | {layers} | {' | '.join(f'{mean:.1%}' for mean in means)} |"


def crossed(found: Measurement, own: Losses, other: Losses) -> tuple[float, float]:
    """The mean and the largest excess of what is expected where formats are chosen by other losses than the model's."""
    config = config_of(found)
    sizes = list(sizes_of(config).values())
    sizes += [sizes[0] + i * (sizes[-1] - sizes[0]) // (BUDGETS - 1) for i in range(BUDGETS)]
    excess = []
    for size in sizes:
        chosen, best = (own.expected(fitted(config, by, size).allocation) or 0.0 for by in (other, own))
        excess.append(chosen / best - 1)
    return float(np.mean(excess)), max(excess)


def cross_rows(paths: Sequence[Path]) -> Iterator[str]:
    """Every measurement with every other one of the same model."""
    read: Mapping[Path, Measurement] = {path: read_measurement(path) for path in paths}
    for path, found in read.items():
        for by, other in read.items():
            if by != path and other.model == found.model:
                mean, most = crossed(found, measured(found), measured(other))
                yield f"| {path.stem} | {by.stem} | {mean:.1%} | {most:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measurements", type=Path, nargs="+")
    parser.add_argument("--spread", type=float, default=0.5)
    given = parser.parse_args()
    names = list(sizes_of(config_of(read_measurement(given.measurements[0]))))
    print(f"| measurement | layers | {' | '.join(names)} |")
    print("|" + "---|" * (len(names) + 2))
    for path in given.measurements:
        for row in rows(path, given.spread):
            print(row)
    print("\n| measurement | chosen by | mean excess | largest |\n|---|---|---|---|")
    for row in cross_rows(given.measurements):
        print(row)


if __name__ == "__main__":
    main()
