"""The command that makes files: build."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...formats.text import printable
from . import options as opt
from .console import coverage, gigabytes, listed, note, paragraph, resumable, show
from .fitting import build_told, fit_request
from .progress import Progress
from .several import asked_tiers, folder_of, show_results

if TYPE_CHECKING:
    from ..encode.encoders import Encoder
    from ..pipeline.build import BuildResult, RunOptions
    from ..pipeline.build_spec import BuildSpec
    from ..pipeline.statistics import Statistics
    from ..spec.recipe import Recipe


def build(
    tier: opt.Tiers = None,
    all_tiers: opt.AllTiers = False,
    recipe: opt.RecipeFile = None,
    memory: opt.Memory = None,
    size: opt.Size = None,
    bits: opt.Bits = None,
    context: opt.Context = None,
    measurement: opt.MeasurementFile = None,
    avoid: opt.Avoid = None,
    write_recipe: opt.WriteRecipe = None,
    source: opt.SourceName = None,
    revision: opt.Revision = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write. Default: MODEL.TIER in this folder."),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="The folder for the files of several tiers, each under its default name. A file that is finished "
            "there already stays as it is. Default: this folder."
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="An importance matrix (llama.cpp's GGUF or .dat) instead of the recipe's."),
    ] = None,
    no_imatrix: Annotated[
        bool,
        typer.Option("--no-imatrix", help="Build without importances and AWQ scales. The file says so."),
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="A folder that `mq-quant calibrate` made, instead of an imatrix. With --imatrix too, that one serves "
            "the experts that saw few tokens."
        ),
    ] = None,
    calibration_state: Annotated[
        Path | None,
        typer.Option(
            help="A folder that `mq-quant calibrate --streams` made: a part runs no layer before its own."
        ),
    ] = None,
    effort: Annotated[
        opt.Effort | None,
        typer.Option(
            help="How much is done for the file: weights are rounded under an imatrix, or under what the model's "
            "experts see of a text (calibrated); or levels, norms and attention are trained after that too (tuned). "
            "Default: the recipe's, else the most that this machine does in a night, which `mq-quant plan` tells; "
            "imatrix where --imatrix is given without it."
        ),
    ] = None,
    sensitivity: Annotated[
        bool | None,
        typer.Option(
            help="Run the source forward and back first, to find what errors behind each layer cost: a calibrated file "
            "then has about a seventh less divergence at 3 and 4 bits. Default: where the source is a folder; a hub's "
            "is not read twice."
        ),
    ] = None,
    text: opt.Text = None,
    tokens: opt.Tokens = None,
    sequences: opt.Sequences = None,
    length: opt.Length = None,
    fit: Annotated[
        opt.Fit | None,
        typer.Option(
            help="How codes and levels are chosen, instead of the recipe's way: as the engine's own quantiser does "
            "(reference), for the least squared error (exact), or for the least error of the outputs (hessian)."
        ),
    ] = None,
    no_gain: Annotated[
        bool,
        typer.Option("--no-gain", help="Leave the levels as fitted, without the factor against shrinking."),
    ] = False,
    awq_alpha: Annotated[
        float | None,
        typer.Option(min=0, max=2, help="The exponent of the AWQ scales, instead of a search for the best."),
    ] = None,
    device: Annotated[
        opt.BuildDevice,
        typer.Option(
            help="Where the work is done; `cuda` means an AMD GPU too, `auto` a GPU where there is one. Weights are "
            "rounded to the same bytes everywhere; what a text tells differs in its last bits from device to device. "
            "The fit `reference` stays on the CPU."
        ),
    ] = "auto",
    jobs: opt.Jobs = None,
    shard_cache: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Shards of a hub source that may lie on the disk at once. Default: 2, where a text is used 4.",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Encode these layers alone, as in 8-15, into a part, which `mq-quant merge` takes."
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(help="Encode one of several equal parts of the layers, as in 3/8."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="auto|local|ADDRESS",
            help="Encode on a Ray cluster: that of this machine (auto), one at an address, or one that is started here "
            "(local). --jobs is the number of cores of one task, by default half of the smallest node's.",
        ),
    ] = None,
    force: opt.Force = False,
    restart: opt.Restart = False,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Build the file of a tier, or of several tiers in one pass.

    The same command continues a build that was interrupted. Of several tiers, each tensor is read once, and each file
    is the one that a build of its tier alone would make.

    \b
    Examples:
      mq-quant build --tier mq2-lloyd --source tiny
      mq-quant build --tier mq2 --source MiniMaxAI/MiniMax-M2.5 --revision main
      mq-quant build --tier mq3 --source ./MiniMax-M2.7 --imatrix imatrix.gguf -o /data/m27.mq3
      mq-quant build --tier mq2 --source ./MiniMax-M2.7 --calibration calib
      mq-quant build --tier mq2 --source ./MiniMax-M2.7 --effort calibrated --text corpus.txt --sequences 128
      mq-quant build --tier mq2 --source ./MiniMax-M2.7 --effort imatrix --imatrix imatrix.gguf --device cuda
      mq-quant build --tier mq3 --source ./MiniMax-M2.7 --imatrix imatrix.gguf --part 3/8
      mq-quant build --tier mq3 --source ./MiniMax-M2.7 --effort calibrated --calibration-state state --part 3/8
      mq-quant build --tier mq3 --source /shared/MiniMax-M2.7 --effort imatrix --ray auto -o /shared/m27.mq3
      mq-quant build --tier mq2 --tier mq3 --tier mq4 --output-dir /data
      mq-quant build --all-tiers --effort calibrated --output-dir /data
      mq-quant build --recipe mine.yaml --jobs 8 --json
      mq-quant build --memory 96GB
      mq-quant build --size 85.0GB --measurement m27.json --avoid down:MQ4 --write-recipe mine.yaml
    """
    if no_imatrix and (fit == "hessian" or awq_alpha):
        raise typer.BadParameter("--no-imatrix leaves nothing for --fit hessian or --awq-alpha to work with")
    names = asked_tiers(tier, all_tiers, recipe)
    wanted = fit_request(
        (memory, size, bits, context), (names, recipe), (source, revision), measurement, avoid, write_recipe
    )
    folder = folder_of(names, output, output_dir, layers or part or ray or wanted)
    if layers and part:
        raise typer.BadParameter("--layers and --part both say what is encoded: give one of the two")
    if calibration_state and not (layers or part or ray):
        raise typer.BadParameter(
            "--calibration-state goes with --part, --layers or --ray: a whole build runs all layers"
        )
    with (
        Progress(
            f"build {output.name if output else ', '.join(names) or recipe or wanted}", quiet
        ) as progress,
        resumable("the same command continues the build, with --restart it begins anew"),
    ):
        from ...formats.machine import cores
        from ...kernels.runtime.drivers import best_device
        from ..encode.encoders import open_encoder, torch_device
        from ..pipeline.build import RunOptions, build_file
        from ..pipeline.build_spec import RecipeChanges
        from ..pipeline.effort import Wishes, choose
        from ..pipeline.parts import part_of
        from ..pipeline.tiers import build_files, one_effort
        from ..spec.hooks import nothing
        from ..spec.places import choose_recipe
        from ..write.inputs import check_no_input

        if output is not None:
            check_no_input(output, (recipe,))
        asked = opt.token_request(text, tokens, sequences, length)
        wishes = Wishes(effort, fit, imatrix, no_imatrix, calibration, asked, calibration_state, sensitivity)
        changes = RecipeChanges(fit, False if no_gain else None, awq_alpha)
        where = best_device() if device == "auto" else device
        workers = jobs or cores()
        cluster = opt.cluster(ray, jobs, device, shard_cache)

        def statistics(chosen: Recipe) -> Statistics | None:
            return choose(chosen, wishes, lambda: torch_device(where, asked=device != "auto"), workers)

        def options(encoder: Encoder, accept: Callable[[BuildSpec], None] = nothing) -> RunOptions:
            return RunOptions(
                output=output,
                jobs=workers,
                encoder=encoder,
                force=force,
                restart=restart,
                shard_cache=shard_cache,
                cluster=cluster,
                accept=accept,
                on_note=lambda sentence: note(f"note: {sentence}"),
                watch=progress,
            )

        def make(chosen: Recipe, accept: Callable[[BuildSpec], None] = nothing) -> BuildResult:
            asked_part = part_of(chosen, layers, part)
            with open_encoder("cpu" if cluster else where) as encoder:
                return build_file(chosen, statistics(chosen), options(encoder, accept), changes, asked_part)

        if wanted is not None:
            finish = partial(show, build_told(wanted, write_recipe, make), as_json, quiet, _render_build)
        elif folder is None:
            (name,) = names or (None,)
            result = make(choose_recipe(name, recipe, source, revision))
            finish = partial(show, result, as_json, quiet, _render_build)
        else:
            recipes = [choose_recipe(name, recipe, source, revision) for name in names or (None,)]
            same = one_effort(recipes, [statistics(chosen) for chosen in recipes])
            with open_encoder(where) as encoder:
                made = build_files(recipes, folder, same, options(encoder), changes)
            finish = partial(show_results, made, as_json, quiet)
    finish()


def _render_build(result: BuildResult) -> str:
    return "\n".join(
        (
            f"{printable(str(result.path))}: {gigabytes(result.total_bytes)} in {result.tensor_count} tensors",
            f"quantization hash  {result.quantization_hash}",
            f"time               {result.seconds:.1f} s, {result.weights_per_second / 1e6:.1f} M weights/s",
            f"peak memory        {gigabytes(result.peak_rss_bytes)}",
            f"expert coverage    {coverage(result.coverage)}",
            f"fallbacks          {len(result.fallbacks) or 'none'}",
            *(f"  {line}" for line in listed(result.fallbacks, "inspect --provenance shows them")),
            *(paragraph(f"the engine: {sentence}") for sentence in result.engine),
        )
    )


COMMANDS: dict[str, Callable[..., None]] = {"build": build}
