"""What a card says of one file: sizes, formats, the memory that it fits, how it was made. Only metadata are read."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...formats.engine_facts import EngineFact, concerns
from ...formats.errors import HfqError
from ...formats.hfq import HfqFile, open_hfq
from ...formats.hfq.provenance import Provenance, stated_quantization_hash
from ...formats.hfq.stored import config_of, format_of
from ...formats.minimax import ModelConfig, expert_name, inventory
from ..spec.recipe import fitted_tiers, tiers
from ..spec.running import machine_for


@dataclass(frozen=True)
class CardFile:
    """One file. `bits` are those of a weight of its experts; `statistics` says what its experts were rounded under;
    `build` is the command that makes it again, None where its recipe is not bundled; `concerns` is what the engine
    does with its experts that a user should know.
    """

    path: Path
    bytes: int
    tier: str | None
    description: str | None
    gate_up: str
    down: str
    rest: str
    bits: float
    memory: str
    statistics: str
    build: str | None
    quantization_hash: str | None
    program: str | None
    concerns: tuple[EngineFact, ...]

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Origin:
    """What files of one card have in common: the model's name, the repository of its source and that's revision."""

    model: str
    repository: str | None
    revision: str | None


def read_facts(path: Path) -> tuple[CardFile, Origin]:
    """Read one file's metadata; HfqError where it is no file, InputError where it does not say what a card needs."""
    with open_hfq(path) as file:
        return _facts(file, config_of(file)), _origin(file)


def _facts(file: HfqFile, config: ModelConfig) -> CardFile:
    made = Provenance.of(file)
    recipe = made.recipe
    experts = [(spec, file.entry(spec.name)) for spec in inventory(config) if spec.role == "expert"]
    weights = (
        3
        * config.hidden_size
        * config.intermediate_size
        * config.num_local_experts
        * config.num_hidden_layers
    )
    size = file.path.stat().st_size
    tier = recipe.tier if recipe else None
    return CardFile(
        file.path,
        size,
        tier,
        _text(recipe.document.get("description")) if recipe else None,
        _formats(file, config, "w1"),
        _formats(file, config, "w2"),
        _rest(file),
        8 * sum(entry.nbytes for _, entry in experts) / weights,
        machine_for(size, config),
        _statistics(made),
        _build(made, file.path.name) if tier in (*tiers(), *fitted_tiers()) else None,
        stated_quantization_hash(file.metadata),
        made.program.version,
        concerns((spec, entry.quant_type) for spec, entry in experts),
    )


def _formats(file: HfqFile, config: ModelConfig, projection: str) -> str:
    """The formats of a projection, those of most layers first; with how many they are where there are several."""
    names = (expert_name(layer, 0, projection) for layer in range(config.num_hidden_layers))
    found = Counter(format_of(file, file.entry(name)).name for name in names)
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(
        f"{name} ({count} layer{'s' if count > 1 else ''})" for name, count in found.most_common()
    )


def _rest(file: HfqFile) -> str:
    """The format of attention."""
    try:
        return format_of(file, file.entry("model.layers.0.self_attn.q_proj.weight")).name
    except HfqError:
        return "unknown"


def _origin(file: HfqFile) -> Origin:
    made = Provenance.of(file)
    recipe = made.recipe
    origin: Mapping[str, Any] = made.source.origin if made.source else {}
    repository = _text(origin.get("repository")) or (recipe.repository if recipe else None)
    model = (recipe.model if recipe else None) or file.path.stem
    return Origin(model, repository, _text(origin.get("revision")))


def _statistics(made: Provenance) -> str:
    """What the experts were rounded under, in words."""
    parts = []
    if made.calibration is not None:
        count = made.calibration_tokens
        parts.append("a calibration" if count is None else f"a calibration on {count:,} tokens")
    if made.imatrix is not None:
        sets = made.imatrix.document.get("datasets")
        names = [name for name in sets if isinstance(name, str)] if isinstance(sets, list) else []
        parts.append("an imatrix" + (f" of {', '.join(names[:3])}" if names else ""))
    text = " and ".join(parts) if parts else "no statistics of the model's inputs"
    return f"{text}, then tuned against the source" if made.tuned_layers else text


def _build(made: Provenance, name: str) -> str:
    """The command that makes a file of a bundled tier from the same repository."""
    recipe = made.recipe
    assert recipe is not None
    effort = "tuned" if made.tuned_layers else "calibrated" if made.calibration else "imatrix"
    effort = effort if made.calibration or made.imatrix or made.tuned_layers else ""
    wanted = f"--effort {effort}" if effort else "--no-imatrix"
    source = recipe.repository or "SOURCE"
    return f"mq-quant build --tier {recipe.tier} --source {shlex.quote(source)} {wanted} --output {shlex.quote(name)}"


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
