"""The model card of one or several files of one model: README.md with the hub's header, pictures, and SHA256SUMS.

Nothing is claimed that was not measured: without an evaluation the card says so.
"""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from ...formats.engine_rules import CONTEXT
from ...formats.errors import CheckError, OutputError
from ...formats.own_file import disk_errors
from ...formats.text import printable
from ...formats.unchanged import UnchangedFile
from ...formats.watch import UNWATCHED, Watch
from ...texts import EVALUATION_SHA256
from ..evaluate.pictures import BY_SIZE, BY_TOKENS, pictures_of, write_pictures
from ..evaluate.result import EvaluatedFile, Evaluation, read_evaluation
from ..spec.places import local_folder
from ..spec.running import NOTE
from .base_model import README, BaseModel, base_model
from .facts import CardFile, Origin, read_facts

SUMS = "SHA256SUMS"
LIBRARY = "hipfire"
TAGS = ("hipfire", "hfq", "mq-quant", "quantized", "moe", "minimax_m2")
SPACE = "\u00a0"
"""A space at which no line is broken."""
_CAPTIONS = {
    BY_SIZE: "KL divergence against file size",
    BY_TOKENS: "KL divergence against calibration tokens",
}
_MARKS = str.maketrans({c: f"\\{c}" for c in "|*_[]`\\"})


@dataclass(frozen=True)
class CardOptions:
    """What the user says about a card. `evaluation` is a file of `evaluate`; `base` a folder or repository whose card
    declares the licence, by default the files' source; what is given here stands in place of what that declares.
    """

    evaluation: Path | None = None
    base: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    force: bool = False


@dataclass(frozen=True)
class CardResult:
    """What was written; `notes` say what the card could not say."""

    folder: Path
    readme: Path
    sums: Path
    files: tuple[str, ...]
    pictures: tuple[str, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """What `card --json` prints."""
        paths = {key: str(getattr(self, key)) for key in ("folder", "readme", "sums")}
        return {**asdict(self), **paths}


def write_card(
    paths: Sequence[Path],
    folder: Path,
    options: CardOptions = CardOptions(),
    watch: Watch = UNWATCHED,
) -> CardResult:
    """Write README.md and SHA256SUMS of files of one model into a folder, which is made where there is none.

    `watch` hears how the files are hashed. Raises CheckError where the files are of different models or the evaluation
    is of none of them, OutputError where something would be replaced without `force`.
    """
    read = [read_facts(path) for path in paths]
    found = sorted((f for f, _ in read), key=lambda f: -f.bytes)
    origin = _one_origin([(f, o) for f, o in read])
    _check_names(found)
    readme, checksums = folder / README, folder / SUMS
    _check_output(folder, (readme, checksums), options.force)
    evaluation = read_evaluation(options.evaluation) if options.evaluation else None
    measured = _measured(found, evaluation, options.evaluation)
    base = _declared(origin, options)
    watch.begin("hashing", sum(f.bytes for f in found), "bytes")
    sums = [f"{UnchangedFile(f.path, CheckError).sha256(watch)}  {f.name}" for f in found]
    drawn = {name: f for name, f in pictures_of(measured).items() if name in (BY_SIZE, BY_TOKENS)}
    pictures = write_pictures(folder, drawn)
    text = render_card(found, origin, base, evaluation, measured, pictures)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        readme.write_text(text, encoding="utf-8")
        checksums.write_text("".join(f"{line}\n" for line in sums), encoding="utf-8")
    return CardResult(
        folder, readme, checksums, tuple(f.name for f in found), pictures, _notes(found, measured, base)
    )


def render_card(
    files: Sequence[CardFile],
    origin: Origin,
    base: BaseModel,
    evaluation: Evaluation | None = None,
    measured: Sequence[EvaluatedFile] = (),
    pictures: Sequence[str] = (),
) -> str:
    """The text of README.md; `files` and `measured` stand in the card in their order."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters.update(
        md=_md, code=_code, sh=shlex.quote, n=_number, pm=_with_error, gb=_gb, percent=_percent
    )
    template = environment.from_string(
        resources(__name__.rpartition(".")[0]).joinpath("card.md.jinja").read_text("utf-8")
    )
    return template.render(
        header=_header(origin, base),
        model=origin.model,
        repository=origin.repository,
        versions=sorted({f.program or "of an unknown version" for f in files}),
        files=[{**vars(f), "name": f.name, "purpose": _purpose(f)} for f in files],
        memory_note=NOTE.removeprefix("fits in: "),
        evaluation=evaluation if measured else None,
        text_note=_text_note(evaluation),
        measured=measured,
        pictures=[(p, _CAPTIONS[p.removesuffix(".png")]) for p in pictures if p.endswith(".png")],
        limits=_limits(files, measured),
        license_note=_license_note(base),
    )


def _header(origin: Origin, base: BaseModel) -> str:
    from huggingface_hub import ModelCardData

    named = base.repository or origin.repository
    data = ModelCardData(
        base_model=named,
        base_model_relation="quantized" if named else None,
        license=base.license,
        license_name=base.license_name,
        license_link=base.license_link,
        language=list(base.languages) or None,
        library_name=LIBRARY,
        pipeline_tag=base.pipeline,
        tags=list(TAGS),
    )
    return f"---\n{data.to_yaml()}\n---"


def _one_origin(read: Sequence[tuple[CardFile, Origin]]) -> Origin:
    first, origin = read[0]
    for file, other in read[1:]:
        if other != origin:
            raise CheckError(
                f"is of {other.model} from {other.repository} at {other.revision}, and {first.name} of "
                f"{origin.model} from {origin.repository} at {origin.revision}",
                file=file.path,
                hint="make one card for each model",
            )
    return origin


def _check_names(files: Sequence[CardFile]) -> None:
    names = [f.name for f in files]
    for f in files:
        if names.count(f.name) > 1:
            raise CheckError("two files have this name, and they go into one folder", file=f.path)
        if "\n" in f.name or not f.name.isprintable():
            raise CheckError("its name cannot stand in SHA256SUMS", file=f.path, hint="rename it")


def _check_output(folder: Path, written: Sequence[Path], force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError("is not a folder", file=folder, hint="give --output a folder")
    for path in written:
        if path.exists() and not force:
            raise OutputError("exists already", file=path, hint="give --force to replace it")


def _measured(
    files: Sequence[CardFile], evaluation: Evaluation | None, path: Path | None
) -> list[EvaluatedFile]:
    """What an evaluation says of the files, found by their quantization hash, under the names that they have now."""
    if evaluation is None:
        return []
    pairs = [(f, evaluation.of(f.quantization_hash)) for f in files]
    known = [replace(found, name=f.name) for f, found in pairs if found is not None]
    if not known:
        raise CheckError(
            "is of none of these files: the quantization hashes differ",
            file=path,
            hint="evaluate them again: mq-quant evaluate FILE… --source …",
        )
    return known


def _declared(origin: Origin, options: CardOptions) -> BaseModel:
    """What the base model declares, and what was given in place of it."""
    place = options.base or origin.repository
    folder = local_folder(place) if place else None
    given = {
        key: value
        for key in ("license", "license_name", "license_link")
        if (value := getattr(options, key)) is not None
    }
    if place is None or (folder is None and options.license is not None):
        base = BaseModel(origin.repository)
    else:
        base = base_model(origin.repository if folder else place, folder)
    return replace(base, **given)


def _notes(files: Sequence[CardFile], measured: Sequence[EvaluatedFile], base: BaseModel) -> tuple[str, ...]:
    notes = []
    if base.license is None:
        notes.append("the base model declares no licence here; give --license and --license-link")
    if base.repository is None:
        notes.append("the files name no repository as their source, so the card names no base model")
    without = [f.name for f in files if f.name not in {m.name for m in measured}]
    if without:
        notes.append(f"not measured: {', '.join(without)}; `mq-quant evaluate` measures KLD")
    return tuple(notes)


# --- words ----------------------------------------------------------------------------------------------------------


def _purpose(file: CardFile) -> str:
    return (
        f"{file.tier}: {file.description}"
        if file.tier and file.description
        else file.tier or "of an unknown recipe"
    )


def _text_note(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    tokens = evaluation.tokens
    whose = (
        "the evaluation text that comes with mq-quant (prose, code, mathematics, chat, nine languages)"
        if tokens.text == EVALUATION_SHA256
        else f"a text of the publisher's (token ids with SHA-256 `{tokens.sha256[:16]}…`)"
    )
    return f"{whose}, in sequences of {tokens.length} tokens"


def _limits(files: Sequence[CardFile], measured: Sequence[EvaluatedFile]) -> list[str]:
    limits = [
        "They run in hipfire and in no other engine."
        if len(files) > 1
        else "It runs in hipfire and in no other engine.",
        f"hipfire clamps the context of this architecture to {CONTEXT:,} tokens, with a Q8 cache.",
    ]
    for fact in dict.fromkeys(fact for f in files for fact in f.concerns):
        names = ", ".join(f"`{_code(f.name)}`" for f in files if fact in f.concerns)
        limits.append(f"{names}: {_md(fact.warning)}.")
    if measured:
        limits.append(
            "KLD was measured in short sequences, with the weights as they are stored and sums in f32. It says "
            "nothing of long contexts, nor of what the engine's own arithmetic adds."
        )
    return limits


def _license_note(base: BaseModel) -> str | None:
    if base.license is None:
        return None
    name = base.license_name or base.license
    of = f"[{_md(name)}]({base.license_link})" if base.license_link else _md(name)
    return f"The licence of the base model holds here too: {of}."


def _md(text: str) -> str:
    """Text of strangers for Markdown: it becomes no markup, no HTML and no new line."""
    return html.escape(printable(text), quote=False).translate(_MARKS)


def _code(text: str) -> str:
    """Text of strangers between two backticks, in a table too."""
    return printable(text).replace("`", "'").replace("|", "\\|")


def _number(value: float) -> str:
    return f"{value:#.4g}" if math.isfinite(value) and value else "0" if value == 0 else "–"


def _with_error(value: float, error: float) -> str:
    """A figure with its standard error, to the second digit of that."""
    if not (math.isfinite(error) and error > 0):
        return _number(value)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f}{SPACE}±{SPACE}{error:.{decimals}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}{SPACE}%"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}{SPACE}GB" if size >= 1e9 else f"{size / 1e6:.1f}{SPACE}MB"
