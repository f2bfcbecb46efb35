"""From a budget to a recipe: never above it, never worse than a tier of its size, and better with each byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from measurement_document import document
from mq_quant.formats.errors import BudgetError, MeasurementError, OutputError
from mq_quant.formats.minimax import parse_config
from mq_quant.quantize.fit.allocation import allocation_of
from mq_quant.quantize.fit.avoided import read_avoided
from mq_quant.quantize.fit.budget import read_budget
from mq_quant.quantize.fit.fitted import Fitted, Fitting
from mq_quant.quantize.fit.generic import generic
from mq_quant.quantize.fit.losses import Losses
from mq_quant.quantize.fit.measurement import EXPERT_NAMES
from mq_quant.quantize.fit.request import FitRequest, fit
from mq_quant.quantize.fit.written import recipe_text, write_recipe
from mq_quant.quantize.spec.estimates import tier_table
from mq_quant.quantize.spec.places import model_files
from mq_quant.quantize.spec.recipe import fitted_tiers, load_model, load_recipe, load_tier, tiers
from mq_quant.quantize.spec.running import run_bytes

CONFIG = parse_config(model_files(load_model("minimax-m2.7")).config)
SIZES = {row.tier: row.total_bytes for row in tier_table().tiers}


def request(size: str, source: str | None = None, avoid: tuple[str, ...] = ()) -> FitRequest:
    budget = read_budget(None, size, None, None)
    assert budget is not None
    return FitRequest(source, None, budget, None, read_avoided(avoid))


def by_size(nbytes: int) -> Fitted:
    return fit(request(f"{nbytes}B"))


def test_each_budget_is_kept_and_more_bytes_never_lose_more() -> None:
    step = (SIZES["mq4"] - SIZES["mq2-mini"]) // 6
    found = [by_size(SIZES["mq2-mini"] + i * step) for i in range(7)]
    assert all(f.total_bytes <= f.limit for f in found)
    assert all(
        f.limit - f.total_bytes < 200e6 for f in found[1:]
    )  # the room of the largest step of one piece
    lost = [generic(CONFIG).total(f.allocation) for f in found]
    assert lost == sorted(lost, reverse=True)


@pytest.mark.parametrize("tier", tiers())
def test_at_the_size_of_a_tier_nothing_loses_more_than_the_tier(tier: str) -> None:
    found, losses = by_size(SIZES[tier]), generic(CONFIG)
    own = allocation_of(load_tier(tier), CONFIG)
    assert found.total_bytes <= SIZES[tier]
    assert losses.total(found.allocation) <= losses.total(own)
    if losses.total(found.allocation) >= (1 - losses.doubt) * losses.total(own):
        assert (found.tier, found.recipe) == (tier, load_tier(tier))


def test_memory_holds_file_and_engine() -> None:
    budget = read_budget("96GB", None, None, None)
    assert budget is not None
    found = fit(FitRequest(None, None, budget))
    assert 95.5e9 < run_bytes(found.total_bytes, CONFIG) <= 96e9
    assert found.recipe.tier == "memory-96gb" and found.expected_kld is None


@pytest.mark.parametrize("size", ["67.4GB", "1B", "179.9GB", "1000TB"])
def test_sizes_that_no_file_has_are_refused_with_those_that_files_have(size: str) -> None:
    with pytest.raises(BudgetError, match=r"files have 674[0-9]{8} to 179[78][0-9]{8} bytes"):
        fit(request(size))


def test_the_sizes_of_the_hint_can_be_had() -> None:
    with pytest.raises(BudgetError) as e:
        fit(request("1GB"))
    least, most = [word for word in (e.value.hint or "").split() if word.endswith("GB")]
    assert fit(request(least)).tier == "mq2-mini"
    assert set(fit(request(most)).allocation.of("down")) >= {"MQ6"}


@pytest.mark.parametrize("tier", fitted_tiers())
def test_bundled_tiers_are_what_is_chosen_for_their_memory(tier: str) -> None:
    """Right in every version of the engine, by typical losses."""
    budget = read_budget(f"{tier.removeprefix('fit-')}GB", None, None, None)
    assert budget is not None
    found = fit(FitRequest(None, None, budget, None, read_avoided(["down:MQ4"])))
    assert load_tier(tier).rules == found.recipe.rules
    assert not found.wrong


def test_what_is_avoided_is_not_taken() -> None:
    found = fit(request("100GB", avoid=("down:MQ4",)))
    assert "MQ4" not in found.allocation.of("down")
    assert not found.wrong
    assert "down:MQ4" in by_size(100 * 10**9).wrong
    with pytest.raises(BudgetError, match="no format is left for down"):
        fit(request("100GB", avoid=("down:MQ2-Lloyd", "down:MQ3-Lloyd", "down:MQ4", "down:MQ6")))


def test_a_written_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    wanted = request("85.0GB")
    found, path = fit(wanted), tmp_path / "mine.yaml"
    write_recipe(path, found, wanted.asked)
    assert load_recipe(path) == found.recipe
    head = " ".join(line[2:] for line in path.read_text().splitlines() if line.startswith("#"))
    assert "--size 85.0GB" in head and "nobody has measured" in head
    write_recipe(path, found, wanted.asked)
    path.write_text(path.read_text() + "\n")
    with pytest.raises(OutputError, match="exists already"):
        write_recipe(path, found, wanted.asked)
    with pytest.raises(OutputError, match="mkdir -p"):
        write_recipe(tmp_path / "no" / "mine.yaml", found, wanted.asked)


def test_a_recipe_for_a_folder_names_the_folder(small: Path, tmp_path: Path) -> None:
    wanted = request("1.2MB", str(small))
    found, path = fit(wanted), tmp_path / "mine.yaml"
    path.write_text(recipe_text(found, wanted.asked))
    assert load_recipe(path) == found.recipe and str(small) in path.read_text()


def test_a_measurement_of_another_model_is_refused(tmp_path: Path, small: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(document()))
    with pytest.raises(MeasurementError, match="is of another model: its layers is 2 and the model's 62"):
        fit(replace(request("85GB"), measurement=path))
    with pytest.raises(MeasurementError, match="its experts is 4 and the model's 3"):
        fit(replace(request("1.2MB", str(small)), measurement=path))


def test_a_tier_is_kept_where_a_fit_is_not_clearly_better() -> None:
    """All pieces alike but for one in the last layer, so that something is better than the tier by a little."""

    def fitted(advantage: float) -> Fitted:
        plain = dict(zip(EXPERT_NAMES, (1.0, 0.3, 0.1, 0.01), strict=True))
        easy = {name: value * (1 - advantage) for name, value in plain.items()}
        pieces = (plain,) * (2 * CONFIG.num_hidden_layers - 40) + (easy,) * 40
        standard = {name: load_tier(name) for name in tiers()}
        budget = request(f"{SIZES['mq2']}B").budget
        files = model_files(standard["mq2"].model)
        return Fitting(standard, files, CONFIG, budget, Losses(pieces, "ours", doubt=0.05)).best()

    assert fitted(0.0).tier == "mq2"
    assert fitted(0.9).tier is None


def fitting(size: str, losses: dict[str, float]) -> Fitting:
    """What M2.7 is fitted by where all pieces lose alike."""
    standard = {name: load_tier(name) for name in tiers()}
    pieces = (losses,) * (2 * CONFIG.num_hidden_layers)
    files = model_files(standard["mq2"].model)
    return Fitting(standard, files, CONFIG, request(size).budget, Losses(pieces, "ours"))


def test_only_formats_that_were_measured_are_taken() -> None:
    found = fitting("85GB", {"MQ2-Lloyd": 1.0, "MQ3-Lloyd": 0.3}).best()
    assert {name for _, _, name in found.allocation.pieces()} == {"MQ2-Lloyd", "MQ3-Lloyd"}
    with pytest.raises(BudgetError, match="files have"):
        fitting("85GB", {"MQ6": 0.1}).best()


WHOLE = replace(model_files(load_model("minimax-m2.7")), complete=True)
"""The texts of M2.7 are not at hand; here nothing is kept free for them."""


def in_bytes_of(tier: str, losses: Losses, more: int = 0) -> Fitted:
    """The best that is found in the bytes that `plan` says of a tier's file."""
    standard = {name: load_tier(name) for name in tiers()}
    budget = read_budget(None, f"{SIZES[tier] + more}B", None, None)
    assert budget is not None
    return Fitting(standard, WHOLE, CONFIG, budget, losses).best()


def test_formats_that_take_just_the_bytes_of_a_tier_are_found() -> None:
    """Gate and up of one layer in 3 bits for down of two layers in 2: provenance is counted neither here nor there. The
    rules of the recipe are longer than the tier's, by less than a page.
    """
    plain = {"MQ2-Lloyd": 1.0, "MQ3-Lloyd": 0.9}
    dear, free = {"MQ2-Lloyd": 99.0, "MQ3-Lloyd": 0.9}, {"MQ2-Lloyd": 0.9, "MQ3-Lloyd": 0.9}
    pieces = [plain] * (2 * CONFIG.num_hidden_layers)
    pieces[0], pieces[3], pieces[5] = dear, free, free
    found = in_bytes_of("mq2", Losses(tuple(pieces), "ours"), 4096)
    assert found.tier is None
    assert found.allocation.layers[:3] == (
        ("MQ3-Lloyd", "MQ3-Lloyd"),
        ("MQ2-Lloyd", "MQ2-Lloyd"),
        ("MQ2-Lloyd", "MQ2-Lloyd"),
    )


@pytest.mark.parametrize(("tier", "least"), [("mq2-mini", 0.0), ("mq2", 0.1), ("mq3", 0.15), ("mq4", 0.04)])
def test_a_deep_model_whose_layers_differ_gains_at_every_tier_but_the_smallest(
    tier: str, least: float
) -> None:
    """Typical losses times a random factor for each piece, as benchmarks/fit_places.py has them."""
    random = np.random.default_rng(0)
    pieces = tuple(
        {name: value * factor for name, value in piece.items()}
        for piece, factor in zip(
            generic(CONFIG).pieces, np.exp(random.normal(0, 0.5, 2 * CONFIG.num_hidden_layers)), strict=True
        )
    )
    losses = Losses(pieces, "random")
    own = losses.total(allocation_of(load_tier(tier), CONFIG))
    gain = 1 - losses.total(in_bytes_of(tier, losses).allocation) / own
    assert gain > least if least else gain == 0
