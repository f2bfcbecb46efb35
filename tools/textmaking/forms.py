"""The forms of the catalogue: each turns the files of a pick into documents, (label, text) by (label, text).

A form whose documents are whole (`WHOLE`) writes them at their length; the others are cut into pieces later.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import PurePosixPath
from typing import Any

from textmaking import about_code, about_countries, about_docs, problems
from textmaking.catalogue import Pick
from textmaking.clean import is_written_by_hand, licence_header

File = tuple[str, str]
Document = tuple[str, str]
Form = Callable[[Sequence[File], Pick], Iterator[Document]]


_REFERENCE = re.compile(r"^\.\. auto\w+::|^ +:members:", re.MULTILINE)


def prose(files: Sequence[File], pick: Pick) -> Iterator[Document]:
    """Documentation in reStructuredText, Markdown or plain text, as it is; lists of names only are left out."""
    for path, text in files:
        if len(_REFERENCE.findall(text)) > text.count("\n") / 12:
            continue
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
        yield (
            path,
            re.sub(r"^\.\. (?:include|raw|image|figure)::.*\n(?:[ \t]+.*\n)*", "", text, flags=re.MULTILINE),
        )


def translated(files: Sequence[File], pick: Pick) -> Iterator[Document]:
    """Markdown of translated manuals: without code, which is the same in all languages, and without HTML."""
    for path, text in files:
        text = re.sub(r"^[ \t]*(`{3,}).*?^[ \t]*\1[ \t]*$\n?", "", text, flags=re.DOTALL | re.MULTILINE)
        text = re.sub(r"^(?:===|\{!|!!! Check).*\n|^[ \t]*///.*\n", "", text, flags=re.MULTILINE)
        text = re.sub(r'<a href="([^"]*)"[^>]*>(.*?)</a>', r"[\2](\1)", text, flags=re.DOTALL)
        text = re.sub(r"</?[a-z][^>\n]*>|<!--.*?-->|\{ ?[#.][^}\n]*\}", "", text, flags=re.DOTALL)
        yield path, re.sub(r"\n\s*\n\s*\n+", "\n\n", text)


def code(files: Sequence[File], pick: Pick) -> Iterator[Document]:
    """Source files, without their licence headers; generated files are left out."""
    for path, text in files:
        _, text = licence_header(text)
        if text and is_written_by_hand(text):
            yield path, text


def joined_code(files: Sequence[File], pick: Pick) -> Iterator[Document]:
    """Short source files, joined folder by folder."""
    for folder, group in groupby(code(files, pick), key=lambda d: str(PurePosixPath(d[0]).parent)):
        yield folder, "\n\n".join(text.strip("\n") for _, text in group)


def speech(files: Sequence[File], pick: Pick) -> Iterator[Document]:
    """Speeches that stand on one line: a paragraph ends with the sentence that passes 700 characters."""
    for path, text in files:
        paragraphs, held = [], ""
        for sentence in re.split(r"(?<=[.!?]) +(?=[A-Z\"])", " ".join(text.split())):
            held = f"{held} {sentence}" if held else sentence
            if len(held) > 700:
                paragraphs.append(held)
                held = ""
        yield path, "\n\n".join([*paragraphs, held])


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(field, text) of all texts of a World Factbook profile."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, key)
    else:
        yield name, value


def facts(files: Sequence[File], pick: Pick) -> Iterator[Document]:
    """The fields of World Factbook entries that are sentences, as an article with a heading for each section."""
    for path, text in files:
        entry = about_countries.profile(text)
        parts = [f"# {about_countries.country_of(entry)}"]
        for section, content in entry.items():
            sentences = [f"{field}: {value}" for field, value in _texts(content) if len(value) > 90]
            if sentences:
                parts += [f"## {section}", *sentences]
        yield path, "\n\n".join(parts)


def _printed(entries: Sequence[tuple[Any, Any]], data: Any, indent: int) -> str:
    values = dict(entries) if isinstance(data, dict) else [value for _, value in entries]
    return json.dumps(values, indent=indent, ensure_ascii=False)


def json_text(files: Sequence[File], pick: Pick) -> Iterator[Document]:
    """JSON, printed anew with an indentation of 2 or 4 by turns: as many top-level entries as fit.

    An entry that does not fit by itself is left out.
    """
    for i, (path, text) in enumerate(files):
        data = about_countries.profile(text) if pick.source.startswith("factbook") else json.loads(text)
        entries = list(data.items()) if isinstance(data, dict) else list(enumerate(data))
        some: list[tuple[Any, Any]] = []
        indent = 2 + 2 * (i % 2)
        for entry in [*entries, None]:
            if entry and len(_printed([*some, entry], data, indent).encode()) <= pick.limit:
                some.append(entry)
                continue
            if some:
                yield f"{path}#{some[0][0]}", _printed(some, data, indent)
            some = [entry] if entry and len(_printed([entry], data, indent).encode()) <= pick.limit else []


_QUOTED = re.compile(r'^(msgid|msgid_plural|msgstr)(?:\[\d\])? ((?:".*"\s*)+)', re.MULTILINE)


def messages(text: str) -> list[tuple[str, str]]:
    """(English, translation) of a gettext catalogue, without plurals and untranslated messages."""
    found = [
        (name, "".join(json.loads(line) for line in value.split("\n") if line.strip()))
        for name, value in _QUOTED.findall(text)
    ]
    pairs = [(a, b) for (x, a), (y, b) in pairwise(found) if (x, y) == ("msgid", "msgstr")]
    return [(a, b) for a, b in pairs if a and b and a != b]


def catalogue(files: Sequence[File], pick: Pick) -> Iterator[Document]:
    """The translated messages of gettext catalogues, one a line, catalogues joined."""
    lines = [
        translation.replace("\n", " ").strip()
        for _, text in files
        for _, translation in messages(text)
        if len(translation.encode()) > 30
    ]
    yield files[0][0], "\n".join(dict.fromkeys(lines))


_WORDS = {
    "english": "the of and to is in for this that with are be you can from or",
    "german": "der die das und ist in zu den mit nicht ein eine auf für von werden wird",
    "spanish": "el la los las de y en que es para un una con por se del",
    "french": "le la les des et est dans pour un une que en du vous par sur",
}
_BLOCK = re.compile(r"<(p|h[1-6]|li|dt|dd|td)\b[^>]*>(.*?)</\1>", re.DOTALL)


def _is_in(language: str, text: str) -> bool:
    if language == "chinese":
        return sum("\u4e00" <= c <= "\u9fff" for c in text) > 0.3 * len(text)
    words = re.findall(r"\w+", text.lower())
    own, english = (sum(word in _WORDS[name].split() for word in words) for name in (language, "english"))
    return own > english and own >= 2


def manual(files: Sequence[File], pick: Pick) -> Iterator[Document]:
    """The paragraphs of an HTML manual that are in the pick's kind of language; untranslated ones are left out."""
    for path, text in files:
        body = text[text.find('<div class="sect1">') :]
        blocks = [
            " ".join(html.unescape(re.sub(r"<[^>]+>", "", m[2])).split()) for m in _BLOCK.finditer(body)
        ]
        own = [block for block in blocks if len(block) > 20 and _is_in(pick.kind, block)]
        yield path, "\n\n".join(dict.fromkeys(own))


def classics(files: Sequence[File], pick: Pick) -> Iterator[Document]:
    """Chinese classics: title, then paragraphs, entry by entry."""

    def entries(value: Any) -> Iterator[str]:
        if isinstance(value, list):
            for item in value:
                yield from entries(item)
        elif isinstance(value, dict):
            body = value.get("paragraphs") or value.get("content")
            if isinstance(body, str):
                body = [body, *value.get("comment", [])]
            if body and isinstance(body[0], str):
                title = value.get("chapter") or value.get("title") or value.get("rhythmic") or ""
                yield "\n".join([title, *body] if title else body)
            elif body:
                yield from entries(body)

    for path, text in files:
        yield path, "\n\n".join(entries(json.loads(text)))


def notebook(files: Sequence[File], pick: Pick) -> Iterator[Document]:
    """Notebooks as Markdown: the text of their cells, and their code between fences."""
    for path, text in files:
        parts = []
        for cell in json.loads(text)["cells"]:
            source = "".join(cell["source"]).strip("\n")
            if source:
                parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        yield path, "\n\n".join(parts)


FORMS: dict[str, Form] = {
    "prose": prose,
    "translated": translated,
    "code": code,
    "joined-code": joined_code,
    "speech": speech,
    "facts": facts,
    "json": json_text,
    "catalogue": catalogue,
    "manual": manual,
    "classics": classics,
    "notebook": notebook,
    "problems": problems.documents,
    "sections": lambda files, pick: about_docs.sections(list(translated(files, pick)), pick),
    "reading": about_code.reading,
    "writing": about_code.writing,
    "lookup": about_countries.lookup,
    "extraction": about_countries.extraction,
    "translation": lambda files, pick: about_docs.translation([(p, messages(t)) for p, t in files], pick),
    "tutoring": problems.tutoring,
}
WHOLE = frozenset(
    {"sections", "reading", "writing", "lookup", "extraction", "translation", "tutoring", "json"}
)
FROM_CODE = frozenset({"code", "joined-code", "reading", "writing"})
"""Forms whose files may begin with a licence header, which the notices keep."""
