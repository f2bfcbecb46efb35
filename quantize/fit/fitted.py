"""From a budget to a recipe: the formats with the least loss whose file has at most so many bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...formats.blocks import BY_NAME
from ...formats.errors import BudgetError
from ...formats.minimax import ModelConfig
from ...verify.bars import Bars
from ..spec.places import ModelFiles, local_folder
from ..spec.recipe import Recipe
from ..spec.tally import file_sizes
from .allocation import Allocation, allocation_of, rules_of
from .budget import Budget
from .losses import Losses
from .measurement import EXPERT_NAMES, PROJECTIONS, Projection
from .solve import Choice, solve

BASE = "mq2"
"""The tier whose rules outside the experts, fit and AWQ settings a fitted recipe has."""
PROVENANCE, PER_SHARD, SHARDS = 4096, 192, 1000
"""Bytes of metadata that are known only once the source is open: for the file, for each shard of the source, and the
number of shards where nobody has said it."""
SIDE_FILES = 32 << 20
"""Bytes for the tokenizer and its files where they are not at hand yet."""

Avoided = Collection[tuple[Projection, str]]


@dataclass(frozen=True)
class Fitted:
    """A recipe that was made for a budget; `tier` is the standard tier that nothing was better than, if it is one.

    `limit` is the most bytes that the file may have, `total_bytes` what it will have. `expected_kld` is None where
    nobody has measured the model. `wrong` names the formats, as `--avoid` takes them, that some version of the engine
    computes wrongly where the file has them.
    """

    recipe: Recipe
    allocation: Allocation
    limit: int
    total_bytes: int
    origin: str
    expected_kld: float | None
    tier: str | None
    wrong: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.resolved(),
            "allocation": [list(formats) for formats in self.allocation.layers],
            "limit": self.limit,
            "total_bytes": self.total_bytes,
            "origin": self.origin,
            "expected_kld": self.expected_kld,
            "tier": self.tier,
            "wrong": list(self.wrong),
        }


@dataclass(frozen=True)
class _Made:
    """What becomes of a standard tier."""

    allocation: Allocation
    nbytes: int


@dataclass(frozen=True)
class Fitting:
    """All that decides what is best: the standard tiers by name, the model, the budget, and the losses. With `sure` the
    provenance, which is known once the source is open, is counted at its most, else not at all, as in `plan`.
    """

    standard: Mapping[str, Recipe]
    files: ModelFiles
    config: ModelConfig
    budget: Budget
    losses: Losses
    avoided: Avoided = ()
    sure: bool = False

    def best(self) -> Fitted:
        """The allocation with the least loss, or a standard tier of no more loss; at the effort that was measured."""
        limit = self.budget.limit(self.config)
        self._check(limit)
        found = self._allocated(limit)
        tier = self._tier(limit, found)
        recipe = self._recipe(found) if tier is None else self.standard[tier]
        found = found if tier is None else self._tiers[tier].allocation
        effort = self.losses.effort or recipe.effort
        return Fitted(
            recipe.model_copy(update={"effort": effort}),
            found,
            limit,
            self._tiers[tier].nbytes if tier else self._bytes(recipe),
            self.losses.origin,
            self.losses.expected(found),
            tier,
            self._wrong(recipe, found),
        )

    def _allocated(self, limit: int) -> Allocation:
        """The least loss in a file of at most `limit` bytes. The rules of a recipe stand in the file and take
        bytes too, so pieces get less room until the whole file fits.
        """
        pieces = self._pieces()
        least = sum(min(choice.nbytes for choice in choices) for choices in pieces)
        room = limit - self._bytes(self._recipe(self._extreme(min))) + least
        while True:
            names = [choice.name for choice in solve(pieces, max(room, least))]
            found = Allocation(tuple(zip(names[::2], names[1::2], strict=True)))
            over = self._bytes(self._recipe(found)) - limit
            if over <= 0 or room <= least:
                return found
            room -= over

    def _wrong(self, recipe: Recipe, allocation: Allocation) -> tuple[str, ...]:
        used = {
            ("down" if p == "down" else "gate and up", name): f"{p}:{name}"
            for _, p, name in allocation.pieces()
        }
        facts = file_sizes(recipe, self.files, self.config).concerns
        return tuple(
            used[fact.projection, name]
            for fact in facts
            for name in fact.formats
            if fact.state in ("wrong", "fails") and (fact.projection, name) in used
        )

    def _tier(self, limit: int, found: Allocation) -> str | None:
        """The best of the standard tiers that fit, unless an allocation is clearly better; None where it is."""
        fitting = [
            (self.losses.total(made.allocation), made.nbytes, name)
            for name, made in self._tiers.items()
            if self._allowed(made.allocation)
            and made.nbytes <= limit
            and not self.losses.clearly_less(found, made.allocation)
        ]
        return min(fitting)[2] if fitting else None

    def _pieces(self) -> list[list[Choice]]:
        config = self.config
        weights = config.num_local_experts * config.hidden_size * config.intermediate_size
        shares = {"gate_up": 2 * weights, "down": weights}
        return [
            [
                Choice(
                    name, BY_NAME[name].nbytes(shares[projection]), self.losses.pieces[2 * layer + i][name]
                )
                for name in self._formats(projection)
            ]
            for layer in range(config.num_hidden_layers)
            for i, projection in enumerate(PROJECTIONS)
        ]

    def _formats(self, projection: Projection) -> tuple[str, ...]:
        """The formats that pieces of a projection may take, the smallest first."""
        known = self.losses.pieces[0]
        found = tuple(n for n in EXPERT_NAMES if n in known and (projection, n) not in self.avoided)
        if not found:
            raise BudgetError(
                f"no format is left for {projection}: --avoid names all that there are losses of",
                hint=f"leave one of {', '.join(known)}",
            )
        return found

    def _allowed(self, allocation: Allocation) -> bool:
        return all(name in self._formats(projection) for _, projection, name in allocation.pieces())

    def _extreme(self, which: Callable[..., str]) -> Allocation:
        """All pieces in the smallest (min) or largest (max) format that they may take."""
        ends = tuple(
            which(self._formats(projection), key=lambda name: BY_NAME[name].group_bytes)
            for projection in PROJECTIONS
        )
        return Allocation(((ends[0], ends[1]),) * self.config.num_hidden_layers)

    def _check(self, limit: int) -> None:
        """BudgetError where even the smallest file is larger than `limit`, or the largest one smaller."""
        ends = []
        for which in (min, max):
            allocation = self._extreme(which)
            tier = next((made for made in self._tiers.values() if made.allocation == allocation), None)
            ends.append(tier.nbytes if tier else self._bytes(self._recipe(allocation)))
        smallest, largest = ends
        if smallest <= limit <= largest:
            return
        what = "smaller than the smallest" if limit < smallest else "larger than the largest"
        raise BudgetError(
            f"{self.budget.option} leaves {limit} bytes for the file, which is {what} that can be made of "
            f"{self.standard[BASE].model.name}: files have {smallest} to {largest} bytes",
            hint=f"give {self.budget.for_file(smallest, self.config, math.ceil)} or more, and at most "
            f"{self.budget.for_file(largest, self.config, math.floor)}",
        )

    def _recipe(self, allocation: Allocation) -> Recipe:
        base = self.standard[BASE]
        limit = self.budget.limit(self.config)
        at_most = f"{limit / 1e9:.4g} GB" if limit >= 10**9 else f"{limit / 1e6:.4g} MB"
        without = ", ".join(sorted(f"{projection}:{name}" for projection, name in self.avoided))
        avoided = f", without {without}" if without else ""
        said = {
            "tier": self.budget.name,
            "description": f"Formats chosen layer by layer for at most {at_most}{avoided}, by {self.losses.origin}.",
            "quantization_hash": None,
            "verify": self._bars(allocation),
            "rules": rules_of(allocation, base),
        }
        return base.model_copy(update=said)

    def _bars(self, allocation: Allocation) -> Bars:
        """What `verify` asks of the best standard tier that is not better than this, else of the smallest."""
        total, known = self.losses.total(allocation), set(self.losses.pieces[0])
        worse = [
            (lost, name)
            for name, made in self._tiers.items()
            if known.issuperset(name for _, _, name in made.allocation.pieces())
            and (lost := self.losses.total(made.allocation)) >= total
        ]
        smallest = min(self._tiers, key=lambda name: self._tiers[name].nbytes)
        return self.standard[min(worse)[1] if worse else smallest].verify

    @cached_property
    def _tiers(self) -> Mapping[str, _Made]:
        """The standard tiers, with the bytes that `plan` says of their files, or the most that they will have."""
        return {
            name: _Made(
                allocation_of(recipe, self.config),
                self._bytes(recipe) if self.sure else file_sizes(recipe, self.files, self.config).total_bytes,
            )
            for name, recipe in self.standard.items()
        }

    def _bytes(self, recipe: Recipe) -> int:
        """The bytes that a recipe's file will have, or, where that has to be `sure`, the most."""
        return file_sizes(recipe, self.files, self.config, self._unknown).total_bytes

    @cached_property
    def _unknown(self) -> int:
        side = 0 if self.files.complete else SIDE_FILES
        if not self.sure:
            return side
        place = self.standard[BASE].model.place
        folder = local_folder(place.address)
        shards = place.shards or (len(list(folder.glob("*.safetensors"))) if folder else SHARDS)
        return PROVENANCE + PER_SHARD * shards + side
