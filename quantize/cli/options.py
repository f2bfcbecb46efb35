"""The options that several commands share: each has its name, its choices and its help text here, once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from ..calibrate.tokens import TokenRequest
    from ..pipeline.cluster.driver import Cluster

TEXTS = "Texts and tokens"
"""Title of the help's section on what a calibration is gathered from."""

Fit = Literal["reference", "exact", "hessian"]
BuildDevice = Literal["auto", "cpu", "cuda", "hip"]
Effort = Literal["imatrix", "calibrated", "tuned"]
MeasureEffort = Literal["imatrix", "calibrated"]
TorchDevice = Literal["cpu", "cuda"]
Backend = Literal["auto", "hip", "cuda", "cpu"]
DownForm = Literal["full", "compact", "pooled"]
Propagate = Literal["source", "quantised"]

File = Annotated[Path, typer.Argument(metavar="FILE", help="An HFQ file.", show_default=False)]


def tier_names(incomplete: str) -> list[str]:
    """The bundled tiers that begin so, for a shell that completes a name."""
    from ..spec.recipe import fitted_tiers, tiers

    return [name for name in tiers() + fitted_tiers() if name.startswith(incomplete)]


Tiers = Annotated[
    list[str] | None,
    typer.Option(
        "--tier",
        help="The name of a tier. `mq-quant tiers` lists them. May be given several times: then all of them are made "
        "in one pass, from one download.",
        autocompletion=tier_names,
    ),
]
AllTiers = Annotated[bool, typer.Option("--all-tiers", help="All standard tiers, in one pass.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A recipe of your own, a YAML file.")]
SourceName = Annotated[
    str | None,
    typer.Option(
        help="The checkpoint: a folder, a hub repository (owner/name), or `tiny`, a small model for trying out. "
        "Default: the repository that the recipe names."
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        help="The branch, tag or commit of a hub repository. Default: the one that the recipe pins, else main."
    ),
]
ModelDevice = Annotated[TorchDevice, typer.Option(help="Where the model runs; `cuda` means an AMD GPU too.")]
Shards = Annotated[
    int, typer.Option("--shard-cache", min=1, help="Shards of a hub source that may lie on the disk at once.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Restart = Annotated[
    bool, typer.Option("--restart", help="Discard the unfinished work on this output and begin anew.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print what it will take, and stop.")
]
Text = Annotated[
    Path | None,
    typer.Option(
        help="A UTF-8 text file instead of the text that comes with mq-quant. It is cut into sequences of --length "
        "tokens."
    ),
]
Tokens = Annotated[
    Path | None,
    typer.Option(help="A .npy file of token ids instead of a text, an integer array [sequences, length]."),
]
Sequences = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Use this many sequences. Default: all of --text or --tokens, 65536 tokens of our own text.",
    ),
]
Length = Annotated[
    int | None,
    typer.Option(min=1, help="The number of tokens in each sequence of a text. Default: 512."),
]
Jobs = Annotated[
    int | None, typer.Option(min=1, help="The number of worker threads. Default: one for each core.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar and print no result.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]

Memory = Annotated[
    str | None,
    typer.Option(
        help="The memory that is to run the file, as in 96GB: formats are chosen for what the engine leaves of it.",
    ),
]
Size = Annotated[
    str | None,
    typer.Option(help="The most bytes of the file, as in 85.0GB or 79200000000B."),
]
Bits = Annotated[
    float | None,
    typer.Option(help="The most bits per weight, over the whole file, as in 2.9."),
]
Context = Annotated[
    int | None,
    typer.Option(
        help="With --memory: the tokens of context that the engine's cache is counted for. Default: all that it runs.",
    ),
]
MeasurementFile = Annotated[
    Path | None,
    typer.Option(
        "--measurement",
        help="What each piece of the model loses in each format, as `mq-quant measure` wrote it down. Default: losses "
        "that are typical of other models.",
    ),
]
Avoid = Annotated[
    list[str] | None,
    typer.Option(
        help="A format that is not to be used, everywhere or in one projection: MQ4, gate_up:MQ3-Lloyd, down:MQ4. "
        "May be given several times.",
    ),
]
WriteRecipe = Annotated[
    Path | None,
    typer.Option("--write-recipe", help="Write the chosen recipe to this file."),
]


def token_request(
    text: Path | None, tokens: Path | None, sequences: int | None, length: int | None
) -> TokenRequest | None:
    """The tokens that these options ask for; None where they ask for nothing but what is usual."""
    from ..calibrate.tokens import LENGTH, TokenRequest

    if text is not None and tokens is not None:
        raise typer.BadParameter("give either --text or --tokens")
    if tokens is not None and length is not None:
        raise typer.BadParameter("--length cuts up a text, and --tokens holds sequences: leave --length out")
    asked = TokenRequest(text, tokens, sequences, length or LENGTH)
    return None if asked == TokenRequest() else asked


def cluster(address: str | None, jobs: int | None, device: BuildDevice, shards: int | None) -> Cluster | None:
    """The Ray cluster that --ray names; None without it. Its tasks are on the CPU unless a GPU is asked for."""
    if address is None:
        return None
    from ..pipeline.cluster.driver import Cluster
    from .console import note

    return Cluster(
        address,
        jobs,
        "cpu" if device == "auto" else device,
        shards or 2,
        on_note=lambda sentence: note(f"note: {sentence}"),
    )
