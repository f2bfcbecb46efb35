"""What is written beside the texts: the list of documents, the licences, SOURCES.md and NOTICE."""

from __future__ import annotations

import html
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from textmaking.catalogue import USES, Source
from textmaking.clean import EMAIL, licence_header
from textmaking.forms import FROM_CODE
from textmaking.mix import Piece

SEPARATOR = "\n\n"
CHANNELS = {"pypi": "PyPI", "npm": "npm", "debian": "Debian"}


def joined(pieces: Sequence[Piece]) -> str:
    """The finished text: the pieces, an empty line between two."""
    return SEPARATOR.join(piece.text for piece in pieces) + "\n"


def table(pieces: Sequence[Piece]) -> str:
    """One line for every document: its kind, its bytes, its source and its label, with a head."""
    lines = [f"{p.pick.kind}\t{p.nbytes}\t{p.pick.source}\t{p.label}" for p in pieces]
    return "\n".join(["kind\tbytes\tsource\tdocument", *lines]) + "\n"


def _manual_notice(page: str) -> str:
    """The paragraphs on copyright, contributors and translators of a manual of KiCad, without e-mail addresses."""
    begin = page.index('id="copyright"')
    end = re.compile(r'<div (?:id="feedback"|class="sect1")').search(page, begin)
    shown = page[begin : end.start() if end else begin].partition(">")[2]
    text = html.unescape(re.sub(r"<[^>]+>", "", shown))
    text = re.sub(r"\s*<[^<>]*(?:@| AT )[^<>]*>", "", text)
    return EMAIL.sub("", "\n".join(line.strip() for line in text.split("\n") if line.strip()))


def _headers(source: Source, pieces: Sequence[Piece], folder: Path) -> str:
    """The licence headers of the source files that pieces were made of, each once, with the files that bear it."""
    files: dict[str, list[str]] = defaultdict(list)
    labels = {
        p.label.partition("#")[0] for p in pieces if p.pick.source == source.name and p.pick.form in FROM_CODE
    }
    for label in sorted(labels):
        path = folder / label
        for file in sorted(path.glob("*")) if path.is_dir() else [path]:
            if file.is_file() and (header := licence_header(file.read_text("utf-8", errors="ignore"))[0]):
                files[header].append(file.relative_to(folder).as_posix())
    return "\n\n".join(f"{', '.join(names)}:\n\n{header}" for header, names in files.items())


def licences(
    sources: Sequence[Source], folders: Mapping[str, Path], pieces: Sequence[Piece]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """({file name: text}, {source: file names}) of licence files and licence headers; equal texts share one file."""
    texts: dict[str, str] = {}
    names: dict[str, list[str]] = defaultdict(list)
    by_text: dict[str, str] = {}

    def keep(source: str, name: str, text: str) -> None:
        text = "\n".join(line.rstrip() for line in text.replace("\r\n", "\n").strip().split("\n")) + "\n"
        name = by_text.setdefault(text, name)
        if texts.setdefault(name, text) != text:
            raise ValueError(f"two licence files would be called {name}")
        if name not in names[source]:
            names[source].append(name)

    for source in sources:
        for file in source.licence_files:
            owner, _, inside = file.rpartition(":")
            text = (folders[owner or source.name] / inside).read_text("utf-8")
            if inside.endswith(".html"):
                text = f"{PurePosixPath(inside).name}\n{_manual_notice(text)}"
            stem = re.sub(r"\.(?:txt|md|html)$", "", PurePosixPath(inside).name)
            keep(source.name, f"{owner or source.name}-{stem}.txt", text)
        if headers := _headers(source, pieces, folders[source.name]):
            keep(source.name, f"{source.name}-headers.txt", headers)
    return texts, names


def _files(pieces: Sequence[Piece]) -> str:
    """The files of some documents, grouped by folder."""
    folders: dict[str, set[str]] = defaultdict(set)
    for piece in pieces:
        path = PurePosixPath(piece.label.partition("#")[0])
        folders[str(path.parent)].add(path.name)
    shown = {
        "" if folder == "." else f"{folder}/": ", ".join(sorted(names)) for folder, names in folders.items()
    }
    return "; ".join(f"`{folder}` {names}" for folder, names in sorted(shown.items()))


def sources_page(
    sources: Sequence[Source], texts: Mapping[str, Sequence[Piece]], names: Mapping[str, Sequence[str]]
) -> str:
    """SOURCES.md: every source with its archive, licence and files, by use."""
    lines = [
        "# Sources of the texts",
        "",
        "Written by `tools/make_texts.py`. Documents are cut, cleaned of licence headers and e-mail addresses, and "
        "some are put into other forms (conversations, articles); the licence files stand in `licences/`.",
    ]
    for source in sources:
        lines += ["", f"## {source.name}", ""]
        if source.archive:
            lines.append(
                f"{source.package} {source.version} of {CHANNELS[source.channel]}, `{source.archive}`, "
                f"SHA-256 `{source.sha256}`."
            )
        lines.append(f"Licence: {source.licence}.{f' {source.note}.' if source.note else ''}")
        if names.get(source.name):
            lines.append(
                "Licence files: "
                + ", ".join(f"[{name}](licences/{name})" for name in names[source.name])
                + "."
            )
        for use in USES:
            own = [piece for piece in texts[use] if piece.pick.source == source.name]
            if own:
                size = sum(piece.nbytes for piece in own) / 1000
                lines += ["", f"{use.capitalize()}, {len(own)} documents, {size:.0f} kB: {_files(own)}."]
    return "\n".join(lines) + "\n"


def notice(sources: Sequence[Source], names: Mapping[str, Sequence[str]]) -> str:
    """NOTICE: the works that the texts hold parts of, with version and licence."""
    lines = [
        "mq-quant",
        "",
        "The calibration text and the evaluation text (folder texts) hold parts of the following works, each under its",
        "own licence. The licence texts and copyright notices are in texts/licences; texts/SOURCES.md says which files",
        "were taken and how they were changed.",
        "",
    ]
    for source in sources:
        if source.archive:
            shown = f"{source.package} {source.version} ({CHANNELS[source.channel]})"
            shown = shown if source.package == source.name else f"{source.name}, from {shown}"
            lines += [f"- {shown}: {source.licence}", f"  {', '.join(names[source.name])}"]
    return "\n".join(lines) + "\n"
