"""What `import mq_quant` offers, as plain functions over the pipeline.

The command line does the same with more options. Every function raises subclasses of MqError, and imports what it needs
when it is called, so that `tiers` and `plan_file` wait for no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..formats.checkpoint.source import Source
    from ..formats.statistics.moment_file import DownForm
    from ..verify.run import Verification
    from .calibrate.run import CalibrationResult
    from .evaluate.result import Evaluation
    from .inspect.reproduce import Reproduction
    from .pipeline.build import BuildResult, RunOptions
    from .pipeline.statistics import Statistics
    from .pipeline.tiers import TierResults
    from .pipeline.work_units import WorkUnit
    from .spec.plan import Plan
    from .spec.recipe import Effort, Recipe

Device = Literal["cpu", "cuda", "hip"]
BackendName = Literal["auto", "hip", "cuda", "cpu"]


def load_recipe(tier_or_path: str | Path, *, source: str | Path | None = None) -> Recipe:
    """A bundled tier by its name, or a recipe of your own by its path (a Path, or a string that ends in .yaml).

    `source` is a folder, a hub repository (owner/name) or "tiny"; by default the recipe's own. Raises RecipeError.
    """
    from .spec.places import choose_recipe

    place = None if source is None else str(source)
    if isinstance(tier_or_path, Path) or tier_or_path.endswith((".yaml", ".yml")):
        return choose_recipe(None, Path(tier_or_path), place)
    return choose_recipe(tier_or_path, None, place)


def tiers(model: str = "minimax-m2.7") -> list[str]:
    """The names of the tiers that are bundled for a model."""
    from .spec.recipe import tiers as names

    return names(model)


def plan_file(recipe: Recipe) -> Plan:
    """Every tensor's format, size and offset, from config.json alone: no weight is read.

    Raises ConfigError where the config is missing or is no MiniMax-M2's, RecipeError where the recipe does not fit it.
    """
    from .spec.estimates import offline_plan
    from .spec.places import model_files

    return offline_plan(recipe, model_files(recipe.model))


def build_file(
    recipe: Recipe,
    output: str | Path | None = None,
    *,
    statistics: Statistics | str | Path | None = None,
    effort: Effort | None = None,
    device: Device = "cpu",
    jobs: int | None = None,
    ray: str | None = None,
    force: bool = False,
    restart: bool = False,
    on_done: Callable[[WorkUnit], None] | None = None,
) -> BuildResult:
    """Build a recipe's file, or continue its unfinished build. Default output: <model>.<tier> in the current folder.

    `effort` is "imatrix", "calibrated" or "tuned"; by default the recipe's own, else the most that this machine does in
    a night. `statistics`: a file is an imatrix, which is what the build rounds under unless an effort is asked for; a
    folder is a calibration. `jobs` workers, one per core by default, do not change a byte; `device` changes none of a
    build under an imatrix or a folder. `ray` is a cluster that encodes: "auto", "local" or an address, as `--ray` takes
    it; then `jobs` are the cores of one task. `on_done(unit)` is called on this thread when a unit of work stands in
    the file.

    Raises OutputError before any work where the output exists (without `force`) or does not fit, ResumeError where an
    unfinished build there is of other arguments (without `restart`), ClusterError where a cluster cannot be used.
    """
    from dataclasses import replace

    from .pipeline import build

    path = None if output is None else Path(output)
    with run_options("cpu" if ray else device, jobs, force, restart, on_done, path) as options:
        if ray is not None:
            from .pipeline.cluster.driver import Cluster

            options = replace(options, cluster=Cluster(ray, jobs, device))
        known = chosen_statistics(recipe, statistics, effort, device, options.jobs)
        return build.build_file(recipe, known, options)


def build_files(
    recipes: Sequence[Recipe],
    folder: str | Path,
    *,
    statistics: Statistics | str | Path | None = None,
    effort: Effort | None = None,
    device: Device = "cpu",
    jobs: int | None = None,
    force: bool = False,
    restart: bool = False,
    on_done: Callable[[WorkUnit], None] | None = None,
) -> TierResults:
    """Build the files of several recipes of one model into a folder in one pass, or continue their unfinished builds.

    Each file is named <model>.<tier> and is the one that `build_file` makes, whose arguments these are. One that is
    finished there already stays as it is (without `force`). An error of one file alone is in its result, and the others
    are made; `TierResults.raise_if_failed()` raises it. Raises OutputError where the folder is missing or has no room
    for all, RecipeError where the recipes are not of one model.
    """
    from .pipeline import tiers

    with run_options(device, jobs, force, restart, on_done) as options:
        chosen = [chosen_statistics(recipe, statistics, effort, device, options.jobs) for recipe in recipes]
        return tiers.build_files(recipes, Path(folder), tiers.one_effort(recipes, chosen), options)


@contextmanager
def run_options(
    device: Device,
    jobs: int | None,
    force: bool,
    restart: bool,
    on_done: Callable[[WorkUnit], None] | None,
    output: Path | None = None,
) -> Iterator[RunOptions]:
    """How a build is run; its encoder is open until the end of the block."""
    from ..formats.machine import cores
    from .encode.encoders import open_encoder
    from .pipeline.build import RunOptions
    from .spec.hooks import nothing

    with open_encoder(device) as encoder:
        yield RunOptions(
            output=output,
            jobs=jobs or cores(),
            encoder=encoder,
            force=force,
            restart=restart,
            on_done=on_done or nothing,
        )


def chosen_statistics(
    recipe: Recipe,
    given: Statistics | str | Path | None,
    effort: Effort | None,
    device: Device,
    jobs: int,
) -> Statistics | None:
    """The statistics of a build: those that are given, as they are or by their place, or what the effort asks for."""
    from .encode.encoders import torch_device
    from .pipeline.effort import Wishes, choose

    if given is not None and not isinstance(given, str | Path):
        return given
    place = None if given is None else Path(given)
    folder = place if place is not None and place.is_dir() else None
    wishes = Wishes(effort, imatrix=None if folder else place, calibration=folder)
    return choose(recipe, wishes, lambda: torch_device(device, asked=True), jobs)


def calibrate(
    source: str | Path,
    tokens: NDArray[np.integer],
    folder: str | Path,
    *,
    down: DownForm = "compact",
    device: Literal["cpu", "cuda"] = "cpu",
    jobs: int | None = None,
) -> CalibrationResult:
    """Gather second moments of a source on token ids [sequences, length] into a folder, or continue there.

    `down` says how experts' moments are kept: "compact" (f16), "full" (f32) or "pooled" (one a layer). Raises
    TokenError for ids that are not the source's, OutputError where the folder cannot be used.
    """
    from ..formats.machine import cores
    from .calibrate import run
    from .calibrate.tokens import check_tokens

    with closing(open_source(source)) as opened:
        opened.validate()
        ids = check_tokens(tokens, opened.config, "tokens")
        options = run.CalibrationOptions(down=down, device=device, jobs=jobs or cores())
        return run.calibrate(opened, ids, Path(folder), options)


def open_source(place: str | Path, *, revision: str | None = None) -> Source:
    """The checkpoint in a folder or a hub repository (owner/name), or "tiny". Close it when you are done.

    Weights come as f32 by name: `source.weight(name)`. `source.validate()` checks all of it on metadata alone. Shards
    of a repository are streamed to the current folder, at most two at a time. Raises CheckpointError or HubError.
    """
    from .spec.places import open_place

    return open_place(str(place), revision, 2, Path())


def verify_file(
    path: str | Path,
    *,
    source: str | Path | None = None,
    tokens: int | None = None,
    backend: BackendName = "auto",
    sample: bool = False,
) -> Verification:
    """Judge a file by its structure and decoding, and against a source, which is found as `mq-quant verify` finds it.

    About `tokens` held-out tokens are run (None: 512, and no fewer); `sample` looks at a fixed sample of the tensors.
    `Verification.raise_if_failed()` raises InputError where a stage missed its bar.
    """
    from ..formats.hfq import open_hfq
    from ..kernels.runtime.host import open_backend
    from ..verify.run import verify
    from .inspect.verify_inputs import VerifyOptions, inputs_of

    options = VerifyOptions(source=None if source is None else str(source), tokens=tokens, sample=sample)
    with (
        open_hfq(path) as file,
        open_backend(backend) as opened,
        closing(inputs_of(file, options)) as inputs,
    ):
        return verify(file, opened, inputs)


def evaluate_files(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    source: str | Path | None = None,
    reference: str | Path | None = None,
    tokens: NDArray[np.integer] | None = None,
    sequences: int | None = None,
    length: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    force: bool = False,
) -> Evaluation:
    """Measure how far files are from their source, all in one pass, and write the result to `output` as JSON.

    `source` is run beside them on token ids [sequences, length], or on the evaluation text of mq-quant, cut into
    `sequences` of `length` (None: 512); `reference`, a file of saved predictions, stands in place of it and holds its
    own tokens. Continues an evaluation that was interrupted. Raises InputError where neither or both are given, or what
    would be without effect.
    """
    from ..formats.errors import InputError
    from ..formats.hfq import open_hfq
    from .calibrate.tokens import check_tokens, own_text
    from .evaluate.reference import of_checkpoint, of_file
    from .evaluate.run import EvaluateOptions
    from .evaluate.run import evaluate_files as run

    files, options = [Path(path) for path in paths], EvaluateOptions(Path(output), device=device, force=force)
    if (source is None) == (reference is None):
        raise InputError("give either source or reference")
    request = own_text(tokens, sequences, length)
    if source is None:
        if not (tokens is None and sequences is None and length is None):
            raise InputError("a reference holds its own tokens: leave tokens, sequences and length out")
        with open_hfq(files[0]) as first:
            against = of_file(Path(str(reference)), first)
        return run(files, against, options)
    with closing(open_source(source)) as opened:
        opened.validate()
        ids = None if tokens is None else check_tokens(tokens, opened.config, "tokens")
        return run(files, of_checkpoint(opened, request, opened.fingerprint(), ids), options)


def reproduce_file(
    path: str | Path,
    *,
    source: str | Path | None = None,
    statistics: str | Path | None = None,
    jobs: int | None = None,
) -> Reproduction:
    """Encode again what a file says it was made from, and compare every payload.

    `source` and `statistics` (a file is an imatrix, a folder a calibration) are needed where the file does not say
    where they are. Raises the errors of inputs that differ or are missing.
    """
    from ..formats.machine import cores
    from .inspect.reproduce import Inputs, reproduce

    given = None if statistics is None else Path(statistics)
    folder = given is not None and given.is_dir()
    inputs = Inputs(
        source=None if source is None else str(source),
        imatrix=None if folder else given,
        calibration=given if folder else None,
    )
    return reproduce(Path(path), inputs, jobs or cores())
