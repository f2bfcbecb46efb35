"""The model card of one or several files of one model: README.md with the hub's header, pictures, and SHA256SUMS.

Nothing is claimed that was not measured: without an evaluation the card says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...formats.errors import InputError, OutputError
from ...formats.hfq.checked import payload_checks
from ...formats.own_file import disk_errors
from ...formats.unchanged import UnchangedFile
from ...formats.watch import UNWATCHED, Watch
from ..evaluate.pictures import BY_SIZE, BY_TOKENS, pictures_of, write_pictures
from ..evaluate.result import EvaluatedFile, Evaluation, read_evaluation
from ..spec.places import local_folder
from ..write.atomic import write_atomic
from .base_model import README, BaseModel, base_model
from .card_text import render_card
from .facts import CardFile, Origin, read_facts

SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class CardOptions:
    """What the user says about a card. `evaluation` is a file of `evaluate`; `base` a folder or repository whose card
    declares the licence, by default the files' source; what is given here stands in place of what that declares.
    `judged` says that whoever asks for the card looks for damaged payloads too.
    """

    evaluation: Path | None = None
    base: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    force: bool = False
    judged: bool = False


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

    `watch` hears how the files are hashed. Raises InputError where the files are of different models or the evaluation
    is of none of them, HfqError where a payload is damaged and files are not `judged`, OutputError where something
    would be replaced without `force`.
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
    sums = [f"{_sha256(f.path, watch, options.judged)}  {f.name}" for f in found]
    drawn = {name: f for name, f in pictures_of(measured).items() if name in (BY_SIZE, BY_TOKENS)}
    pictures = write_pictures(folder, drawn)
    text = render_card(found, origin, base, evaluation, measured, pictures)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(checksums, [memoryview("".join(f"{line}\n" for line in sums).encode())])
    write_atomic(readme, [memoryview(text.encode())])
    return CardResult(
        folder, readme, checksums, tuple(f.name for f in found), pictures, _notes(found, measured, base)
    )


def _sha256(path: Path, watch: Watch, judged: bool) -> str:
    """The SHA-256 of a file, whose payloads are held against their checksums on the way; HfqError."""
    return UnchangedFile(path, InputError).sha256(watch, None if judged else payload_checks(path))


def _one_origin(read: Sequence[tuple[CardFile, Origin]]) -> Origin:
    first, origin = read[0]
    for file, other in read[1:]:
        if other != origin:
            raise InputError(
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
            raise InputError("two files have this name, and they go into one folder", file=f.path)
        if "\n" in f.name or not f.name.isprintable():
            raise InputError("its name cannot stand in SHA256SUMS", file=f.path, hint="rename it")


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
        raise InputError(
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
    if place is None or (options.base is None and folder is None and options.license is not None):
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
