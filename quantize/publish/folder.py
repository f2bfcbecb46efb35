"""What of a folder is published: files, their card, checksums, recipes and reports, each with its size and hash.

A file is taken by what it is, never because it lies there: what is not known is left out, and named. What the folder
lacks (a card, checksums, recipes) is made in memory, so that nothing is written into it.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...formats.errors import CheckError, InputError, MqError
from ...formats.hfq import open_hfq
from ...formats.hfq.layout import MAGIC
from ...formats.hfq.provenance import Provenance
from ...formats.text import printable
from ...formats.unchanged import UnchangedFile
from ...formats.watch import UNWATCHED, Watch
from ...verify.stages.structure import check_structure
from .base_model import README
from .card import SUMS, CardOptions, write_card

COMPANIONS = (".json", ".html", ".png", ".svg", ".yaml", ".md")
NAMED = (README, SUMS, "LICENSE", "NOTICE")
EVALUATION = "evaluation.json"
RECIPE = ".recipe.yaml"


@dataclass(frozen=True)
class Item:
    """One file of the repository: `file` is the one in the folder, None where `content` was made for it."""

    name: str
    size: int
    sha256: str
    file: UnchangedFile | None = None
    content: bytes | None = None

    @property
    def is_model(self) -> bool:
        """Whether it is an HFQ file, and no companion."""
        return self.file is not None and _is_hfq(self.file.path)

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.size, "sha256": self.sha256, "made": self.file is None}


@dataclass(frozen=True)
class Listing:
    """All that would be sent, and nothing else: models first, the card last.

    `problems` speak against sending it, `notes` say what a card that was made for it lacks.
    """

    folder: Path
    repository: str
    items: tuple[Item, ...]
    left_out: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The bytes of all items."""
        return sum(item.size for item in self.items)

    def as_json(self) -> dict[str, Any]:
        """What `publish --dry-run --json` prints."""
        return {
            "folder": str(self.folder),
            "repository": self.repository,
            "bytes": self.size,
            "files": [item.as_json() for item in self.items],
            "left_out": list(self.left_out),
            "problems": list(self.problems),
            "notes": list(self.notes),
        }

    def raise_if_bad(self) -> None:
        """CheckError with the first problem, where there is one."""
        if self.problems:
            first, *others = self.problems
            more = f"\n  and {len(others)} more problems" if others else ""
            raise CheckError(
                f"is not published: {first}{more}",
                file=self.folder,
                hint="mend it, or give --force to publish it all the same",
            )


def list_folder(folder: Path, repository: str, watch: Watch = UNWATCHED) -> Listing:
    """Everything that is to be published of a folder, checked and hashed.

    Raises InputError where it holds no HFQ file, and what the card raises where it has to be made.
    """
    if not folder.is_dir():
        raise InputError("is not a folder", file=folder, hint="give the folder that holds the files")
    paths, left_out = _sorted_out(folder)
    models = [path for path in paths if _is_hfq(path)]
    if not models:
        raise InputError(
            "holds no HFQ file", file=folder, hint="build one into it: mq-quant build -o FOLDER/…"
        )
    problems = [problem for path in models for problem in _structure(path, watch)]
    there = {path.name for path in paths}
    made = dict(_recipes(models, there))
    known: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    if not {README, SUMS} <= there:
        card, notes = _card(folder, models, there, watch)
        known = _read_sums(card[SUMS])
        wanted, notes = ({SUMS}, ()) if README in there else (card.keys(), notes)
        made |= {name: content for name, content in card.items() if name in wanted - there}
    files = {path.name: UnchangedFile(path, InputError) for path in paths}
    unknown = [file for name, file in files.items() if name not in known]
    watch.begin("hashing", sum(file.size for file in unknown), "bytes")
    items = [
        Item(name, file.size, known.get(name) or file.sha256(watch), file) for name, file in files.items()
    ]
    items += [
        Item(name, len(content), hashlib.sha256(content).hexdigest(), None, content)
        for name, content in made.items()
    ]
    problems += _sums_problems(folder, items, there)
    items.sort(key=lambda item: (not item.is_model, item.name == README, item.name))
    return Listing(folder, repository, tuple(items), tuple(left_out), tuple(problems), notes)


def _sorted_out(folder: Path) -> tuple[list[Path], list[str]]:
    """The files to publish, and why others are not."""
    taken, left = [], []
    for path in sorted(folder.iterdir()):
        why = _why_not(path)
        if why is None:
            taken.append(path)
        else:
            left.append(f"{printable(path.name)}: {why}")
    return taken, left


def _why_not(path: Path) -> str | None:
    if path.name.startswith("."):
        return "is hidden"
    if not path.is_file():
        return "is no file"
    if not path.name.isprintable():
        return "its name holds what cannot be printed"
    if ".partial" in path.name:
        return "is unfinished"
    if path.name in NAMED or path.suffix in COMPANIONS or _is_hfq(path):
        return None
    return "is nothing that goes with HFQ files"


def _is_hfq(path: Path) -> bool:
    with path.open("rb") as f:
        return f.read(len(MAGIC)) == MAGIC


def _structure(path: Path, watch: Watch) -> Iterator[str]:
    """What the structure stage finds in a file: a sentence, or none."""
    try:
        with open_hfq(path) as file:
            complaints = list(check_structure(file, watch).complaints)
    except MqError as e:
        complaints = [e.problem]
    if complaints:
        more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
        yield f"{printable(path.name)}: {complaints[0]}{more}"


def _recipes(models: Sequence[Path], there: set[str]) -> Iterator[tuple[str, bytes]]:
    """The recipe of each file as it was resolved, unless the folder has it."""
    for path in models:
        name = path.name + RECIPE
        try:
            with open_hfq(path) as file:
                recipe = Provenance.of(file).recipe
        except MqError:  # the structure stage has said so
            continue
        if recipe is not None and name not in there:
            yield name, yaml.safe_dump(dict(recipe.document), sort_keys=False).encode()


def _card(
    folder: Path, models: Sequence[Path], there: set[str], watch: Watch
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The card, the checksums and the pictures as they are made of these files, and what the card lacks."""
    evaluation = folder / EVALUATION if EVALUATION in there else None
    with tempfile.TemporaryDirectory(prefix="mq-quant-") as made:
        card = write_card(models, Path(made), CardOptions(evaluation=evaluation, judged=True), watch)
        return {path.name: path.read_bytes() for path in sorted(Path(made).iterdir())}, card.notes


def _read_sums(raw: bytes) -> dict[str, str]:
    """{name: SHA-256} of the lines of SHA256SUMS that `sha256sum` would read."""
    lines = (line.partition("  ") for line in raw.decode("utf-8", "replace").splitlines())
    return {name: digest.lower() for digest, _, name in lines if len(digest) == 64}


def _sums_problems(folder: Path, items: Sequence[Item], there: set[str]) -> Iterator[str]:
    """Where SHA256SUMS of the folder says something else than the files."""
    if SUMS not in there:
        return
    stated: Mapping[str, str] = _read_sums((folder / SUMS).read_bytes())
    for item in items:
        if item.is_model and item.name not in stated:
            yield f"{printable(item.name)}: is not in {SUMS}"
        elif stated.get(item.name, item.sha256) != item.sha256:
            yield f"{printable(item.name)}: is not the file that {SUMS} states"
    for name in sorted(stated.keys() - {item.name for item in items}):
        yield f"{printable(name)}: is in {SUMS}, and not in the folder"
