"""A file with formats that no tier has, other ones in each layer, goes through all that the file of a tier does."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_model
from mq_quant.formats.errors import PartError, RecipeError
from mq_quant.formats.hfq import TensorMeta, open_hfq, write_hfq
from mq_quant.formats.hfq.provenance import Provenance
from mq_quant.formats.minimax import expert_name
from mq_quant.kernels.runtime.host import open_backend
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.cli.inspect import _render_file
from mq_quant.quantize.fit.allocation import Allocation, rules_of
from mq_quant.quantize.inspect.reproduce import Inputs, reproduce
from mq_quant.quantize.inspect.show import inspect_file
from mq_quant.quantize.inspect.tier_bars import bars_of
from mq_quant.quantize.inspect.verify_inputs import VerifyOptions, inputs_of
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.build_spec import RecipeChanges
from mq_quant.quantize.pipeline.merge import merge_parts
from mq_quant.quantize.pipeline.parts import LayerRange
from mq_quant.quantize.pipeline.statistics import ImatrixFile, NoStatistics, OnTheFly, Statistics
from mq_quant.quantize.pipeline.tiers import build_files
from mq_quant.quantize.publish.facts import read_facts
from mq_quant.quantize.spec.places import choose_recipe, open_place
from mq_quant.quantize.spec.recipe import Recipe, load_tier
from mq_quant.quantize.tune.file import TuneOptions, tune_file
from mq_quant.quantize.tune.layer import TuneSettings
from mq_quant.verify.run import verify
from mq_quant.verify.stages.structure import check_structure
from small_imatrix import save_imatrix

CONFIG = {**small_model.CONFIG, "num_hidden_layers": 3}
MIXED = Allocation((("MQ3-Lloyd", "MQ2-Lloyd"), ("MQ2-Lloyd", "MQ6"), ("MQ6", "MQ4")))
OTHER = Allocation((("MQ3-Lloyd", "MQ2-Lloyd"), ("MQ3-Lloyd", "MQ6"), ("MQ6", "MQ4")))
ALPHA = RecipeChanges(alpha=0.3)
SHORT = TuneSettings(epochs=2, batch=64, held=0.34)


@pytest.fixture(autouse=True)
def few_threads(one_thread: None) -> None:
    """Every test here."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    small_model.save(folder, small_model.tensors(config=CONFIG), config=CONFIG)
    save_imatrix(folder / "imatrix.gguf", layers=3)
    np.save(folder / "tokens.npy", np.random.default_rng(3).integers(0, 300, (16, 32)).astype(np.int32))
    return folder


def recipe_of(source: Path, allocation: Allocation, tier: str = "mixed") -> Recipe:
    base = choose_recipe("mq2", None, str(source))
    return base.model_copy(update={"tier": tier, "rules": rules_of(allocation, base)})


def imatrix(source: Path) -> Statistics:
    return ImatrixFile(source / "imatrix.gguf")


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "small.mixed"
    return build_file(recipe_of(source, MIXED), imatrix(source), RunOptions(out, jobs=2), ALPHA).path


def test_its_formats_are_those_of_the_recipe_and_are_told_by_layer(made: Path) -> None:
    found = inspect_file(made)
    assert (list(found.gate_up.values()), list(found.down.values())) == (
        ["MQ3-Lloyd", "MQ2-Lloyd", "MQ6"],
        ["MQ2-Lloyd", "MQ6", "MQ4"],
    )
    assert "down: MQ2-Lloyd in layer 0, MQ6 in layer 1, MQ4 in layer 2" in _render_file(False)(found)
    facts, _ = read_facts(made)
    assert facts.gate_up == "MQ3-Lloyd (1 layer), MQ2-Lloyd (1 layer), MQ6 (1 layer)"
    assert {fact.formats for fact in facts.concerns} and facts.build is None


@pytest.mark.parametrize("effort", ["imatrix", "calibrated"])
def test_merged_parts_are_the_file_of_one_machine(
    effort: str, source: Path, made: Path, tmp_path: Path
) -> None:
    statistics = imatrix(source)
    whole = made
    if effort == "calibrated":
        statistics = OnTheFly(TokenRequest(tokens=source / "tokens.npy", sequences=4))
        options = RunOptions(tmp_path / "whole", jobs=2)
        whole = build_file(recipe_of(source, MIXED), statistics, options, ALPHA).path
    parts = [
        build_file(
            recipe_of(source, MIXED), statistics, RunOptions(tmp_path / f"{n}", jobs=1), ALPHA, part
        ).path
        for n, part in enumerate((LayerRange(0, 0, 3), LayerRange(1, 2, 3)))
    ]
    assert merge_parts(parts[::-1], tmp_path / "merged").path.read_bytes() == whole.read_bytes()


def test_parts_of_two_allocations_are_not_merged(source: Path, tmp_path: Path) -> None:
    """Under one name, and with the same formats in the layers of the first part."""
    parts = [
        build_file(
            recipe_of(source, allocation), imatrix(source), RunOptions(tmp_path / f"{n}"), ALPHA, part
        ).path
        for n, (allocation, part) in enumerate(((MIXED, LayerRange(0, 0, 3)), (OTHER, LayerRange(1, 2, 3))))
    ]
    with pytest.raises(PartError, match="is of another build"):
        merge_parts(parts, tmp_path / "merged")


def test_beside_tiers_in_one_pass_it_is_the_same(source: Path, made: Path, tmp_path: Path) -> None:
    recipes = [
        recipe_of(source, MIXED),
        choose_recipe("mq2", None, str(source)),
        recipe_of(source, OTHER, "other"),
    ]
    results = build_files(recipes, tmp_path, imatrix(source), RunOptions(jobs=2), ALPHA)
    results.raise_if_failed()
    assert (tmp_path / "small.mixed").read_bytes() == made.read_bytes()
    assert len({each.path for each in results.tiers if each.path}) == 3
    twice = [recipe_of(source, MIXED), recipe_of(source, OTHER)]
    with pytest.raises(RecipeError):
        build_files(twice, tmp_path / "twice", imatrix(source), RunOptions(jobs=2), ALPHA)


def test_it_is_reproduced_and_tuned(source: Path, made: Path, tmp_path: Path) -> None:
    assert reproduce(made, Inputs(str(source), source / "imatrix.gguf"), 2).identical
    tokens = np.load(source / "tokens.npy")
    options = TuneOptions(output=tmp_path / "tuned", settings=SHORT, jobs=1)
    with closing(open_place(str(source), None, 2, None)) as opened:
        tuned = tune_file(made, opened, tokens, options)
    assert tuned.kept_layers > 0
    with open_hfq(made) as old, open_hfq(tuned.path) as new:
        assert [e.quant_type for e in old.entries] == [e.quant_type for e in new.entries]
    assert inspect_file(tuned.path).down == inspect_file(made).down


def test_it_is_judged_and_held_to_the_bars_of_the_tier_below_it(
    source: Path, made: Path, tmp_path: Path
) -> None:
    options = VerifyOptions(source=str(source), token_file=source / "tokens.npy", generate=0)
    with (
        open_hfq(made) as file,
        open_backend("cpu") as backend,
        closing(inputs_of(file, options)) as inputs,
    ):
        assert inputs.bars == load_tier("mq2-mini").verify
        judged = {stage.name: stage for stage in verify(file, backend, inputs).stages}
    for name in ("decode", "forward", "fidelity"):
        assert judged[name].ok, judged[name].problems


@pytest.mark.parametrize(
    ("layers", "tier"),
    [
        ((("MQ6", "MQ6"),) * 3, "mq4"),
        ((("MQ3-Lloyd", "MQ6"), ("MQ4", "MQ4"), ("MQ3-Lloyd", "MQ4")), "mq3-lloyd"),
        ((("MQ3-Lloyd", "MQ3-Lloyd"), ("MQ2-Lloyd", "MQ6"), ("MQ6", "MQ6")), "mq2"),
    ],
)
def test_a_file_has_the_bars_of_the_largest_tier_that_is_nowhere_larger(
    layers: tuple[tuple[str, str], ...], tier: str, source: Path, tmp_path: Path
) -> None:
    plain = RecipeChanges(fit="reference")
    out = RunOptions(tmp_path / "out", jobs=1)
    build_file(recipe_of(source, Allocation(layers)), NoStatistics(), out, plain)
    with open_hfq(tmp_path / "out") as file:
        assert bars_of(file, Provenance.of(file).recipe) == load_tier(tier).verify


@pytest.mark.parametrize("tier", ["fit-80", "fit-96", "fit-128"])
def test_a_bundled_fitted_tier_has_bars_of_its_own(tier: str, made: Path) -> None:
    with open_hfq(made) as file:
        stated = Provenance.of(file).recipe
        assert stated is not None
        assert bars_of(file, replace(stated, tier=tier)) == load_tier(tier).verify
        assert bars_of(file, None) != load_tier(tier).verify


def test_one_expert_of_another_format_than_its_layer_is_found(made: Path, tmp_path: Path) -> None:
    """The engine reads expert 0: a file with the right formats in every other layer is no less wrong."""
    name = expert_name(1, 2, "w2")
    with open_hfq(made) as file:
        other = file.entry(expert_name(0, 2, "w2"))
        rows = [(e, file.read(e.name)) for e in file.entries]
        planted = TensorMeta(name, other.quant_type, other.shape, other.group_size, other.nbytes)
        rows = [(planted, file.read(other.name)) if e.name == name else (e, data) for e, data in rows]
        write_hfq(tmp_path / "planted", file.metadata_bytes, rows)
    with open_hfq(tmp_path / "planted") as file:
        assert any(name in str(problem) for problem in check_structure(file).complaints)
