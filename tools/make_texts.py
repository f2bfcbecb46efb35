"""Makes texts/calibration.txt.xz and texts/evaluation.txt.xz out of the archives that texts/sources.toml names.

    python tools/make_texts.py                 downloads (about 320 MB into out/texts), and writes texts/ and NOTICE
    python tools/make_texts.py --check         compares what is committed with its records, without a network

The same catalogue gives the same bytes on every machine: archives are pinned by SHA-256, pieces are ordered by hashes
of their names, and nothing is drawn at random. Needs `pip install unearth`, npm, and apt-get on Debian 12.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from textmaking import records
from textmaking.catalogue import CALIBRATION, EVALUATION, USES, Pick, Source, load
from textmaking.clean import SHORTEST, cut, tidy
from textmaking.fetch import fetch
from textmaking.forms import FORMS, WHOLE
from textmaking.mix import Piece, interleave, runs, select

ROOT = Path(__file__).parent.parent
TEXTS = ROOT / "texts"
PLENTY = 20
"""Candidates are read up to so many times the bytes that a pick needs."""
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 23}]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(folder: Path, pick: Pick) -> list[tuple[str, str]]:
    """(path, text) of files of a pick, by path: of large sources only `PLENTY` times what is needed, chosen by hash.

    Files that are not UTF-8 are left out. Raises ValueError where no file matches.
    """
    skipped = {path for pattern in pick.skip for path in folder.glob(pattern)}
    found = {path for pattern in pick.files for path in folder.glob(pattern) if path.is_file()} - skipped
    names = sorted((path.relative_to(folder).as_posix() for path in found), key=lambda n: _sha256(n.encode()))
    files, room = {}, PLENTY * 1000 * pick.kilobytes
    for name in names:
        data = (folder / name).read_bytes()
        try:
            files[name] = data.decode()
        except UnicodeDecodeError:
            continue
        room -= len(data)
        if room < 0:
            break
    if pick.files and not files:
        raise ValueError(f"{pick.source}: no file matches {pick.files}")
    return sorted(files.items())


def pieces_of(pick: Pick, files: Sequence[tuple[str, str]]) -> list[Piece]:
    """All pieces that a pick could give."""
    pieces = []
    for label, text in FORMS[pick.form](files, pick):
        text = tidy(text)
        if pick.form in WHOLE:
            if SHORTEST <= len(text.encode()) <= 16000:
                pieces.append(Piece(pick, label, text))
            continue
        for i, part in enumerate(cut(text, pick.limit)[: pick.parts]):
            pieces.append(Piece(pick, f"{label}#{i}" if i else label, part))
    return pieces


def compose(
    sources: Sequence[Source], folders: Mapping[str, Path], report: Counter[str]
) -> dict[str, list[Piece]]:
    """The documents of both texts in their final order. The evaluation text is chosen first."""
    forbidden: set[int] = set()
    texts: dict[str, list[Piece]] = {}
    for use in (EVALUATION, CALIBRATION):
        picks = [(source, pick) for source in sources for pick in source.picks if pick.use == use]
        candidates = ((pick, pieces_of(pick, _read(folders[source.name], pick))) for source, pick in picks)
        texts[use] = interleave(select(candidates, forbidden, report))
        for piece in texts[use]:
            forbidden |= runs(piece.text)
    return texts


def write(
    sources: Sequence[Source], folders: Mapping[str, Path], texts: Mapping[str, Sequence[Piece]]
) -> None:
    """Write the two texts, their records, the licences, NOTICE, and the hashes in texts/__init__.py."""
    loader = (TEXTS / "__init__.py").read_text("utf-8")
    for use in USES:
        data = records.joined(texts[use]).encode()
        packed = lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=_FILTERS)
        (TEXTS / f"{use}.txt.xz").write_bytes(packed)
        (TEXTS / f"{use}.tsv").write_text(records.table(texts[use]), "utf-8")
        loader = re.sub(rf'({use.upper()}_SHA256 = ")[0-9a-f]*', rf"\g<1>{_sha256(data)}", loader)
    (TEXTS / "__init__.py").write_text(loader, "utf-8")
    licence_texts, names = records.licences(sources, folders, [piece for use in USES for piece in texts[use]])
    (TEXTS / "licences").mkdir(exist_ok=True)
    for old in (TEXTS / "licences").iterdir():
        old.unlink()
    for name, text in licence_texts.items():
        (TEXTS / "licences" / name).write_text(text, "utf-8")
    (TEXTS / "SOURCES.md").write_text(records.sources_page(sources, texts, names), "utf-8")
    (ROOT / "NOTICE").write_text(records.notice(sources, names), "utf-8")


def check(folder: Path = TEXTS) -> list[str]:
    """What is wrong with the committed files, one sentence each: hashes, records, and licence files."""
    wrong = []
    loader = (folder / "__init__.py").read_text("utf-8")
    known = {source.name: source for source in load(folder / "sources.toml")}
    page = (folder / "SOURCES.md").read_text("utf-8")
    for use in USES:
        data = lzma.decompress((folder / f"{use}.txt.xz").read_bytes())
        if f'{use.upper()}_SHA256 = "{_sha256(data)}"' not in loader:
            wrong.append(f"{use}.txt.xz is not the text whose SHA-256 texts/__init__.py holds.")
        rows = [line.split("\t") for line in (folder / f"{use}.tsv").read_text("utf-8").splitlines()[1:]]
        size = sum(int(row[1]) for row in rows) + len(records.SEPARATOR) * (len(rows) - 1) + 1
        if size != len(data):
            wrong.append(
                f"{use}.tsv lists documents of {size} bytes with separators, the text has {len(data)}."
            )
        for name in sorted({row[2] for row in rows}):
            if name not in known:
                wrong.append(f"{use}.tsv names the source {name}, which sources.toml does not.")
            elif f"## {name}\n" not in page or (known[name].sha256 and known[name].sha256 not in page):
                wrong.append(f"SOURCES.md does not name {name} with its archive's SHA-256.")
    linked = set(re.findall(r"\(licences/([^)]+)\)", page))
    held = {path.name for path in (folder / "licences").iterdir()}
    wrong += [f"licences/{name} is missing." for name in sorted(linked - held)]
    wrong += [f"licences/{name} belongs to no source." for name in sorted(held - linked)]
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare the committed files with their records")
    parser.add_argument("--cache", type=Path, default=ROOT / "out" / "texts", help="folder for the archives")
    options = parser.parse_args(arguments)
    if options.check:
        wrong = check()
        print("\n".join(wrong) if wrong else "The texts, their records and their licences agree.")
        return 1 if wrong else 0
    sources = load(TEXTS / "sources.toml")
    folders = {source.name: fetch(source, options.cache) for source in sources}
    report: Counter[str] = Counter()
    texts = compose(sources, folders, report)
    write(sources, folders, texts)
    for use in USES:
        kinds = Counter[str]()
        for piece in texts[use]:
            kinds[piece.pick.kind] += piece.nbytes
        total = sum(kinds.values())
        packed = (TEXTS / f"{use}.txt.xz").stat().st_size
        print(f"{use}: {len(texts[use])} documents, {total} bytes, {packed} compressed")
        print("  " + ", ".join(f"{kind} {100 * size / total:.1f} %" for kind, size in kinds.most_common()))
    for sentence, count in sorted(report.items()):
        print(f"{count:5d} {sentence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
