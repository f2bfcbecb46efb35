"""Several tiers in one pass: the bytes of single builds, each file on its own, whatever stops one of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hub_server
import numpy as np
import pytest
import small_model
from build_hooks import StopError, stopped
from mq_quant.formats.checkpoint.local import Checkpoint
from mq_quant.formats.errors import (
    BackendError,
    InUseError,
    OutputError,
    RecipeError,
    ResumeError,
    WeightError,
)
from mq_quant.quantize.calibrate import on_the_fly, source_layers
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.encode import layer_encoder
from mq_quant.quantize.encode.encoders import CpuEncoder, MatrixTask
from mq_quant.quantize.encode.on_device import layer as device_layer
from mq_quant.quantize.pipeline import encoding, tiers
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.build_spec import RecipeChanges
from mq_quant.quantize.pipeline.statistics import ImatrixFile, NoStatistics, OnTheFly, Statistics
from mq_quant.quantize.pipeline.tiers import TierResults, build_files
from mq_quant.quantize.pipeline.work_units import WorkUnit
from mq_quant.quantize.spec.places import choose_recipe
from mq_quant.quantize.tune.layer import TuneSettings
from mq_quant.quantize.write.journal import Journal
from mq_quant.quantize.write.partial_file import CALIBRATION, JOURNAL, PARTIAL, PartialFile
from small_imatrix import save_imatrix

CONFIG = small_model.CONFIG
TOKENS = np.random.default_rng(3).integers(0, 300, (4, 40)).astype(np.int32)
ALL = ("mq4", "mq3-lloyd", "mq3", "mq2-lloyd", "mq2", "mq2-mini")
MODELS = os.environ.get("MQ_QUANT_MODELS")
FAST = TuneSettings(epochs=1, batch=64, held=0.34)

Together = Callable[..., TierResults]


def saved(folder: Path, config: dict[str, Any]) -> Path:
    small_model.save(folder, small_model.tensors(config=config), config=config)
    np.save(folder / "tokens.npy", TOKENS)
    save_imatrix(folder / "imatrix.gguf")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "small", CONFIG)


def statistics_of(effort: str, source: Path) -> Statistics:
    text = TokenRequest(tokens=source / "tokens.npy")
    return {
        "plain": NoStatistics(),
        "imatrix": ImatrixFile(source / "imatrix.gguf"),
        "calibrated": OnTheFly(text),
        "tuned": OnTheFly(text, tuning=FAST),
    }[effort]


def changes_of(effort: str, **given: Any) -> RecipeChanges:
    """The exponent is pinned, unless a test gives another: searching it is most of the work at this size."""
    return RecipeChanges(**({} if effort == "plain" else {"alpha": 0.3}) | given)


@pytest.fixture(scope="module")
def single(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """The bytes of a build of one tier alone."""
    folder = tmp_path_factory.mktemp("single")

    def built(tier: str, effort: str = "imatrix", **changes: Any) -> bytes:
        out = folder / f"{tier}-{effort}-{changes}"
        if not out.exists():
            recipe = choose_recipe(tier, None, str(source))
            options = RunOptions(output=out, jobs=2)
            build_file(recipe, statistics_of(effort, source), options, changes_of(effort, **changes))
        return out.read_bytes()

    return built


@pytest.fixture
def together(source: Path, tmp_path: Path) -> Together:
    """Build tiers in one pass: together("mq2", "mq3", effort="tuned", jobs=2, …)."""

    def built(*tiers: str, effort: str = "imatrix", alpha: float | None = 0.3, **given: Any) -> TierResults:
        recipes = [choose_recipe(tier, None, str(source)) for tier in tiers]
        statistics = given.pop("statistics", statistics_of(effort, source))
        options = RunOptions(**{"jobs": 2} | given)
        return build_files(
            recipes, tmp_path, statistics, options, changes_of(effort, **_alpha(effort, alpha))
        )

    return built


def _alpha(effort: str, alpha: float | None) -> dict[str, Any]:
    return {} if effort == "plain" else {"alpha": alpha}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def states(results: TierResults) -> list[str]:
    return [each.as_json()["state"] for each in results.tiers]


@pytest.mark.parametrize(
    ("effort", "tiers"),
    [
        ("plain", ("mq4", "mq2")),
        ("imatrix", ALL),
        ("calibrated", ("mq3", "mq2-lloyd", "mq2", "mq2-mini")),
        ("tuned", ("mq2", "mq4")),
    ],
)
def test_the_bytes_are_those_of_single_builds(
    effort: str, tiers: Sequence[str], together: Together, single: Callable[..., bytes], tmp_path: Path
) -> None:
    results = together(*tiers, effort=effort)
    assert states(results) == ["made"] * len(tiers)
    assert names(tmp_path) == sorted(f"small.{tier}" for tier in tiers)
    for each in results.tiers:
        assert each.path.read_bytes() == single(each.tier, effort)


def test_so_they_are_where_rows_have_several_groups(tmp_path: Path) -> None:
    wide = saved(tmp_path / "small", {**CONFIG, "num_hidden_layers": 1, "hidden_size": 512})
    recipes = [choose_recipe(tier, None, str(wide)) for tier in ("mq3-lloyd", "mq2-lloyd", "mq2")]
    given = statistics_of("calibrated", wide), RunOptions(jobs=2), changes_of("calibrated")
    for each, recipe in zip(build_files(recipes, tmp_path, *given).tiers, recipes, strict=True):
        options = RunOptions(output=tmp_path / "single", jobs=2, force=True)
        build_file(recipe, given[0], options, given[2])
        assert each.path.read_bytes() == (tmp_path / "single").read_bytes()


def test_the_exponent_is_searched_for_each_format_as_in_single_builds(
    together: Together, single: Callable[..., bytes]
) -> None:
    for each in together("mq2", "mq4", "mq2-mini", alpha=None).tiers:
        assert each.path.read_bytes() == single(each.tier, alpha=None)


@pytest.mark.skipif(not MODELS, reason="MQ_QUANT_MODELS is not set")
def test_so_they_are_of_a_trained_model_with_exponents_searched(tmp_path: Path) -> None:
    model = Path(str(MODELS)) / "trained-tiny"
    given = ImatrixFile(model / "imatrix.gguf")
    recipes = [choose_recipe(tier, None, str(model)) for tier in ("mq3-lloyd", "mq2-lloyd")]
    results = build_files(recipes, tmp_path, given, RunOptions(jobs=2))
    for each, recipe in zip(results.tiers, recipes, strict=True):
        build_file(recipe, given, RunOptions(output=tmp_path / "single", jobs=2, force=True))
        assert each.path.read_bytes() == (tmp_path / "single").read_bytes()


def test_what_stays_on_a_device_is_shared_there_too(
    together: Together, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = partial(on_the_fly.GatheredImportance, stays=True)
    monkeypatch.setattr(on_the_fly, "GatheredImportance", gather)
    results = together("mq2-lloyd", "mq2", "mq4", effort="calibrated")
    for each in results.tiers:
        options = RunOptions(output=tmp_path / "single", jobs=2, force=True)
        recipe = choose_recipe(each.tier, None, str(source))
        build_file(recipe, statistics_of("calibrated", source), options, changes_of("calibrated"))
        assert each.path.read_bytes() == (tmp_path / "single").read_bytes()


def test_downs_that_cannot_be_rounded_there_stop_their_tiers_alone(
    together: Together, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = partial(on_the_fly.GatheredImportance, stays=True)
    monkeypatch.setattr(on_the_fly, "GatheredImportance", gather)
    real = device_layer.round_downs

    def refused(downs: Any, fmt: Any, *rest: Any) -> Any:
        if fmt.name == "MQ4":
            raise BackendError("no MQ4 here")
        return real(downs, fmt, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(device_layer, "round_downs", refused)
        results = together("mq2", "mq2-lloyd", effort="calibrated")
    assert states(results) == ["made", "failed"]
    assert "no MQ4 here" in str(results.failed[0].error)
    options = RunOptions(output=tmp_path / "single", jobs=2, force=True)
    recipe = choose_recipe("mq2", None, str(source))
    build_file(recipe, statistics_of("calibrated", source), options, changes_of("calibrated"))
    assert (tmp_path / "small.mq2").read_bytes() == (tmp_path / "single").read_bytes()


def test_nothing_is_read_or_encoded_twice(together: Together, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six tiers have three ways of gate and up, and three of down; everything else is one payload for all."""
    read: Counter[str] = Counter()
    encoded: Counter[str] = Counter()
    plain: Counter[str] = Counter()
    weight, encode, tensor = Checkpoint.weight, CpuEncoder.encode, encoding.encode_tensor

    def counted_weight(self: Checkpoint, name: str) -> Any:
        read[name] += 1
        return weight(self, name)

    def counted_encode(self: CpuEncoder, tasks: Sequence[MatrixTask]) -> Any:
        encoded.update(task.form.format.name for task in tasks)
        return encode(self, tasks)

    def counted_tensor(name: str, *given: Any) -> Any:
        plain[name] += 1
        return tensor(name, *given)

    monkeypatch.setattr(Checkpoint, "weight", counted_weight)
    monkeypatch.setattr(CpuEncoder, "encode", counted_encode)
    monkeypatch.setattr(encoding, "encode_tensor", counted_tensor)
    together(*ALL)
    assert set(read.values()) == {1} and set(plain.values()) == {1}
    experts = CONFIG["num_local_experts"] * CONFIG["num_hidden_layers"]
    assert encoded == dict.fromkeys(("MQ2-Lloyd", "MQ3-Lloyd", "MQ4"), 3 * experts)


def test_the_source_is_run_once_for_all_tiers(together: Together, monkeypatch: pytest.MonkeyPatch) -> None:
    layers: list[int] = []
    gather = source_layers.gather_layer

    def counted(weights: Any, config: Any, layer: int, *given: Any, **more: Any) -> Any:
        layers.append(layer)
        return gather(weights, config, layer, *given, **more)

    monkeypatch.setattr(source_layers, "gather_layer", counted)
    together("mq2", "mq3", effort="calibrated")
    assert layers == [0, 1]


def test_each_shard_of_a_hub_is_fetched_once_for_all_tiers(
    small_hub: hub_server.HubServer, tmp_path: Path
) -> None:
    recipes = [choose_recipe(tier, None, hub_server.REPO) for tier in ("mq2", "mq3")]
    (tmp_path / "made").mkdir()
    results = build_files(recipes, tmp_path / "made", NoStatistics(), RunOptions(jobs=2))
    assert states(results) == ["made", "made"]
    hub_server.check_each_shard_was_fetched_once(small_hub)
    assert len(names(tmp_path / "made")) == 2


# --- one tier stops, the others go on -------------------------------------------------------------------------------


def test_a_tier_whose_output_another_build_holds_is_left_out(
    together: Together, single: Callable[..., bytes], tmp_path: Path
) -> None:
    notes: list[str] = []
    held = Journal(tmp_path / f"small.mq3{JOURNAL}")
    try:
        results = together("mq2", "mq3", "mq4", on_note=notes.append)
    finally:
        held.close()
    assert states(results) == ["made", "failed", "made"]
    (failed,) = results.failed
    assert isinstance(failed.error, InUseError) and "small.mq3" in str(failed.error)
    with pytest.raises(InUseError):
        results.raise_if_failed()
    assert any(note.startswith("mq3 is left out") for note in notes)
    assert (tmp_path / "small.mq2").read_bytes() == single("mq2")
    assert states(together("mq2", "mq3", "mq4")) == ["finished already", "made", "finished already"]
    assert (tmp_path / "small.mq3").read_bytes() == single("mq3")


@pytest.mark.parametrize("effort", ["imatrix", "calibrated", "tuned"])
def test_a_tier_whose_disk_is_full_stops_alone_and_is_continued(
    effort: str,
    together: Together,
    single: Callable[..., bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put = PartialFile.put

    def full(self: PartialFile, where: Any, *given: Any) -> None:
        if self.final.name == "small.mq4" and where.key == "layer 1 expert 1":
            raise OutputError("the disk is full", file=self.path)
        put(self, where, *given)

    with monkeypatch.context() as patched:
        patched.setattr(PartialFile, "put", full)
        results = together("mq2", "mq4", effort=effort)
    assert states(results) == ["made", "failed"]
    assert "the disk is full" in str(results.failed[0].error)
    assert (tmp_path / "small.mq2").read_bytes() == single("mq2", effort)
    again = together("mq2", "mq4", effort=effort)
    assert states(again) == ["finished already", "made"]
    made = again.tiers[1].result
    assert made is not None and 0 < made.resumed_units < made.units
    assert (tmp_path / "small.mq4").read_bytes() == single("mq4", effort)
    assert names(tmp_path) == ["small.mq2", "small.mq4"]


def test_a_matrix_that_one_format_cannot_hold_stops_its_tiers_alone(
    together: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = layer_encoder.check_levels

    def refuse(name: str, fmt: Any, payload: Any) -> None:
        if fmt.name == "MQ4":
            raise WeightError("needs levels beyond what MQ4 stores", tensor=name)
        check(name, fmt, payload)

    monkeypatch.setattr(layer_encoder, "check_levels", refuse)
    results = together("mq4", "mq3-lloyd", "mq3", "mq2")
    assert states(results) == ["failed", "failed", "made", "made"]
    assert all(isinstance(each.error, WeightError) and each.error.tensor for each in results.failed)


def test_no_tier_is_left_where_all_are_refused(together: Together, tmp_path: Path) -> None:
    (tmp_path / "small.mq2").mkdir()
    results = together("mq2")
    assert states(results) == ["failed"] and "is a folder" in str(results.failed[0].error)


# --- continued --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", ["imatrix", "tuned"])
def test_a_set_that_was_killed_continues_each_file_from_its_own_journal(
    effort: str, together: Together, single: Callable[..., bytes], source: Path, tmp_path: Path
) -> None:
    with stopped(at="layer 1 expert 0") as hook:
        together("mq2", effort=effort, on_begin=hook, jobs=1)
    with stopped(at="layer 0 expert 1") as hook:
        together("mq4", effort=effort, on_begin=hook, jobs=1, restart=True)
    results = together("mq2", "mq3", "mq4", effort=effort)
    made = [each.result for each in results.tiers]
    assert all(made)
    resumed = [each.resumed_units for each in made if each]
    assert resumed[0] > resumed[2] > resumed[1] == 0
    for tier in ("mq2", "mq3", "mq4"):
        assert (tmp_path / f"small.{tier}").read_bytes() == single(tier, effort)
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize("effort", ["calibrated", "tuned"])
def test_a_file_of_a_set_is_continued_alone_and_one_begun_alone_in_a_set(
    effort: str, together: Together, single: Callable[..., bytes], source: Path, tmp_path: Path
) -> None:
    with stopped(at="layer 1 expert 1") as hook:
        together("mq2", "mq4", effort=effort, on_begin=hook, jobs=1)
    assert f"small{CALIBRATION}" in names(tmp_path)
    recipe = choose_recipe("mq2", None, str(source))
    options = RunOptions(output=tmp_path / "small.mq2", jobs=2)
    alone = build_file(recipe, statistics_of(effort, source), options, changes_of(effort))
    assert alone.resumed_units > 0
    assert states(together("mq2", "mq4", effort=effort)) == ["finished already", "made"]
    for tier in ("mq2", "mq4"):
        assert (tmp_path / f"small.{tier}").read_bytes() == single(tier, effort)
    assert names(tmp_path) == ["small.mq2", "small.mq4"]


def test_an_unfinished_file_of_other_arguments_is_refused_alone(together: Together) -> None:
    with stopped(10) as hook:
        together("mq2", on_begin=hook, alpha=0.5)
    results = together("mq2", "mq3")
    assert states(results) == ["failed", "made"]
    error = results.failed[0].error
    assert isinstance(error, ResumeError) and "recipe.awq.alpha is 0.5 there and 0.3 here" in str(error)
    assert states(together("mq2", restart=True)) == ["made"]


def test_a_finished_file_of_other_inputs_is_not_taken_for_this_one(
    together: Together, tmp_path: Path
) -> None:
    together("mq2", alpha=0.5)
    before = (tmp_path / "small.mq2").read_bytes()
    results = together("mq2", "mq3")
    assert states(results) == ["failed", "made"]
    assert "recipe.awq.alpha is 0.5 there and 0.3 here" in str(results.failed[0].error)
    assert "--force" in str(results.failed[0].error)
    assert (tmp_path / "small.mq2").read_bytes() == before
    assert states(together("mq2", "mq3", force=True)) == ["made", "made"]
    assert (tmp_path / "small.mq2").read_bytes() != before


def test_a_file_that_is_no_hfq_file_is_neither_finished_nor_replaced(
    together: Together, tmp_path: Path
) -> None:
    (tmp_path / "small.mq2").write_bytes(b"somebody's")
    results = together("mq2", "mq3")
    assert states(results) == ["failed", "made"]
    assert (tmp_path / "small.mq2").read_bytes() == b"somebody's"


# --- refused before work ----------------------------------------------------------------------------------------------


def test_tiers_that_do_not_fit_together_are_refused_before_work(
    together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum((tmp_path / f"small.{tier}").stat().st_size for tier in ("mq2", "mq3") if together(tier))
    for path in tmp_path.iterdir():
        path.unlink()
    monkeypatch.setattr(tiers, "free_bytes", lambda _: size // 2)
    with pytest.raises(OutputError, match=r"the tiers need 0\.0 GB together") as caught:
        together("mq2", "mq3", on_begin=lambda _: pytest.fail("work was begun"))
    assert "fewer tiers" in str(caught.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("given", "said"), [((), "no tier was given"), (("mq2", "mq2"), "the tier mq2 is given twice")]
)
def test_wrong_lists_of_tiers_are_refused(given: tuple[str, ...], said: str, together: Together) -> None:
    with pytest.raises(RecipeError, match=said):
        together(*given)


def test_recipes_of_different_sources_are_refused(source: Path, tmp_path: Path) -> None:
    recipes = [choose_recipe("mq2", None, str(source)), choose_recipe("mq3", None, "tiny")]
    with pytest.raises(RecipeError, match="mq2 and mq3 are of different models"):
        build_files(recipes, tmp_path, NoStatistics(), RunOptions())


def test_a_folder_that_is_not_there_is_refused(source: Path, tmp_path: Path) -> None:
    recipe = choose_recipe("mq2", None, str(source))
    with pytest.raises(OutputError, match="folder does not exist"):
        build_files([recipe], tmp_path / "none", NoStatistics(), RunOptions())


def test_an_error_of_the_source_stops_all_and_nothing_is_lost(
    together: Together, single: Callable[..., bytes], tmp_path: Path
) -> None:
    def stop(unit: WorkUnit) -> None:
        if unit.key == "layer 1 expert 2":
            raise StopError

    with pytest.raises(StopError):
        together("mq2", "mq3", on_begin=stop)
    assert sorted(name for name in names(tmp_path) if name.endswith(PARTIAL)) == [
        f"small.mq2{PARTIAL}",
        f"small.mq3{PARTIAL}",
    ]
    results = together("mq2", "mq3")
    assert all(each.result and each.result.resumed_units for each in results.tiers)
    assert (tmp_path / "small.mq3").read_bytes() == single("mq3")
