"""The texts of the package: whole, clean, mixed, licensed, and apart from each other."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from mq_quant import texts
from textmaking.mix import RUN, runs

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "texts"
USES = ("calibration", "evaluation")
CODE = {"python", "c", "c++", "rust", "go", "javascript", "typescript", "java", "shell", "sql"}
LANGUAGES = {"german", "spanish", "french", "portuguese", "russian", "japanese", "korean"}
KINDS = {"english", "mathematics", "chat", "json", "chinese"} | CODE | LANGUAGES


@dataclass(frozen=True)
class Entry:
    """A document with its line of the record."""

    kind: str
    source: str
    name: str
    text: str


@cache
def entries(use: str) -> tuple[Entry, ...]:
    """The documents of a text, cut as its record says; what stands between two is an empty line."""
    text = texts.calibration_text() if use == "calibration" else texts.evaluation_text()
    data, start, found = text.encode(), 0, []
    for line in (FOLDER / f"{use}.tsv").read_text("utf-8").splitlines()[1:]:
        kind, size, source, name = line.split("\t")
        end = start + int(size)
        found.append(Entry(kind, source, name, data[start:end].decode()))
        assert data[end : end + 2] in (b"\n\n", b"\n")
        start = end + 2
    assert start == len(data) + 1
    return tuple(found)


def sizes(documents: tuple[Entry, ...], part: float = 1.0) -> Counter[str]:
    """Bytes by kind in the first part of a text."""
    total = sum(len(e.text.encode()) for e in documents)
    found: Counter[str] = Counter()
    for entry in documents:
        if found.total() >= part * total:
            break
        found[entry.kind] += len(entry.text.encode())
    return found


def shares(use: str, part: float = 1.0) -> dict[str, float]:
    """{kind: share of the bytes} of the first part of a text."""
    found = sizes(entries(use), part)
    return {kind: size / found.total() for kind, size in found.items()}


def test_the_texts_are_those_that_the_hashes_name() -> None:
    for text, sha256 in (
        (texts.calibration_text(), texts.CALIBRATION_SHA256),
        (texts.evaluation_text(), texts.EVALUATION_SHA256),
    ):
        assert hashlib.sha256(text.encode()).hexdigest() == sha256


@pytest.mark.parametrize("damaged", [b"", b"no xz file", b"cut"])
def test_a_damaged_text_is_refused(damaged: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (FOLDER / "evaluation.txt.xz").read_bytes()
    (tmp_path / "evaluation.txt.xz").write_bytes(whole[:5000] if damaged == b"cut" else damaged)
    monkeypatch.setattr(texts, "files", lambda package: tmp_path)
    with pytest.raises(OSError, match=r"evaluation.txt.xz .* damaged.* Reinstall mq-quant"):
        texts.evaluation_text()


def test_another_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "CALIBRATION_SHA256", "0" * 64)
    with pytest.raises(OSError, match="its SHA-256 is not 0000"):
        texts.calibration_text()


def test_the_sizes_are_about_four_megabytes_and_two_hundred_kilobytes() -> None:
    assert 3.8e6 < len(texts.calibration_text().encode()) < 4.4e6
    assert 1.8e5 < len(texts.evaluation_text().encode()) < 2.4e5
    assert sum((FOLDER / f"{use}.txt.xz").stat().st_size for use in USES) < 1.5e6


@pytest.mark.parametrize("use", USES)
def test_documents_have_two_to_sixteen_kilobytes_and_stand_once(use: str) -> None:
    documents = entries(use)
    assert all(2000 <= len(e.text.encode()) <= 16000 for e in documents)
    assert all(e.text == e.text.strip("\n") for e in documents)
    assert len({e.text for e in documents}) == len(documents)
    assert len({(e.source, e.name, e.kind) for e in documents}) == len(documents)


@pytest.mark.parametrize("use", USES)
def test_characters_are_plain_text_in_nfc(use: str) -> None:
    text = "".join(e.text for e in entries(use))
    assert unicodedata.is_normalized("NFC", text)
    odd = {c for c in set(text) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")}
    assert odd <= {"\n", "\t"}
    assert not re.search(r"[ \t]\n", text)


@pytest.mark.parametrize("use", USES)
def test_there_are_no_addresses_and_no_licence_headers(use: str) -> None:
    text = "\n".join(e.text for e in entries(use))
    addresses = re.findall(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b(?!\()", text)
    assert set(addresses) <= {"name@example.com"}
    assert not re.search(r"(?i)copyright|all rights reserved|spdx-license|@author", text)


def test_code_is_not_minified() -> None:
    for entry in entries("calibration") + entries("evaluation"):
        if entry.kind in CODE:
            assert max(map(len, entry.text.split("\n"))) <= 400, entry


def test_every_kind_has_its_share() -> None:
    held = shares("calibration")
    assert set(held) == KINDS
    assert 0.33 < held["english"] < 0.42
    assert 0.24 < sum(held[kind] for kind in CODE) < 0.32
    assert held["mathematics"] > 0.07 and held["chat"] + held["json"] > 0.10 and held["chinese"] > 0.05
    assert all(held[kind] > 0.01 for kind in KINDS)
    judged = shares("evaluation")
    assert set(judged) == KINDS
    assert all(abs(judged[kind] - held[kind]) < 0.04 for kind in KINDS)


@pytest.mark.parametrize("part", [0.05, 0.065, 0.1, 0.25, 0.5])
def test_a_prefix_holds_every_kind_by_its_share(part: float) -> None:
    """A kind has its share to within one document; 5 % are 200 kB, and the first 65,536 tokens 6.5 %."""
    documents = entries("calibration")
    whole, prefix = shares("calibration"), sizes(documents, part)
    assert set(prefix) == KINDS
    for kind in KINDS:
        largest = max(len(e.text.encode()) for e in documents if e.kind == kind)
        assert abs(prefix[kind] - whole[kind] * prefix.total()) <= largest, kind


def test_the_first_twentieth_is_like_the_whole() -> None:
    whole, prefix = shares("calibration"), shares("calibration", 0.05)
    for kinds in ({"english"}, {"mathematics"}, {"chat", "json"}, {"chinese"}, CODE, LANGUAGES):
        assert abs(sum(prefix[k] for k in kinds) - sum(whole[k] for k in kinds)) < 0.04, kinds


def test_no_run_of_words_stands_in_both_texts() -> None:
    held = set().union(*(runs(e.text) for e in entries("calibration")))
    for entry in entries("evaluation"):
        assert held.isdisjoint(runs(entry.text)), entry.name


def test_no_run_of_words_stands_in_both_texts_by_another_count() -> None:
    """Words as Python sees them, conversations left out: their format has words that all of them share."""

    def found(use: str) -> set[tuple[str, ...]]:
        words = [re.findall(r"\w+", e.text.lower()) for e in entries(use) if e.kind != "chat"]
        return {tuple(w[i : i + RUN]) for w in words for i in range(len(w) - RUN + 1)}

    assert found("calibration").isdisjoint(found("evaluation"))


def test_no_document_comes_from_a_file_of_the_other_text() -> None:
    """Made problems and conversations are named by number; their seeds and phrases differ instead."""
    first, second = ({(e.source, e.name.partition("#")[0]) for e in entries(use)} for use in USES)
    assert first & second <= {("mq-quant", "problems"), ("mq-quant", "tutoring")}


def test_no_document_repeats_others() -> None:
    seen: set[int] = set()
    for entry in sorted(entries("calibration"), key=lambda e: (e.source, e.name)):
        own = runs(entry.text)
        assert len(own & seen) <= 0.2 * len(own), entry.name
        seen |= own


def test_every_source_is_named_with_licence_texts_that_exist() -> None:
    page, notice = (FOLDER / "SOURCES.md").read_text("utf-8"), (ROOT / "NOTICE").read_text("utf-8")
    parts = {part.split("\n", 1)[0]: part for part in page.split("\n## ")[1:]}
    for source in {e.source for use in USES for e in entries(use)} - {"mq-quant"}:
        assert re.search(rf"^- {re.escape(source)}[ ,]", notice, re.MULTILINE)
        names = re.findall(r"\(licences/([^)]+)\)", parts[source])
        sizes = {name: (FOLDER / "licences" / name).stat().st_size for name in names}
        assert max(sizes.values()) > 500, source
        assert all(size and name in notice for name, size in sizes.items())


def test_every_document_is_named_with_its_file() -> None:
    page = (FOLDER / "SOURCES.md").read_text("utf-8")
    parts = {part.split("\n", 1)[0]: part for part in page.split("\n## ")[1:]}
    for use in USES:
        for entry in entries(use):
            file = entry.name.partition("#")[0].rpartition("/")[2]
            assert file in parts[entry.source], entry.name


def test_no_licence_is_copyleft() -> None:
    allowed = {"MIT", "BSD-3-Clause", "Apache-2.0", "ISC", "CC0-1.0", "CC-BY-4.0", "public domain"}
    licences = re.findall(
        r"^Licence: (.+?)\.(?: |$)", (FOLDER / "SOURCES.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(licences) > 30
    assert {name for licence in licences for name in licence.split(" OR ")} <= allowed


TURN = re.compile(r"\]~b\](system|user|ai|tool)\n(.*?)\[e~\[(?:\n|\Z)", re.DOTALL)


@pytest.mark.parametrize("use", USES)
def test_conversations_follow_the_chat_format(use: str) -> None:
    """System, user, then the model; a tool's turn answers calls, and only declared tools are called."""
    for entry in (e for e in entries(use) if e.kind == "chat"):
        assert entry.text.startswith("]~!b[]~b]system\n"), entry.name
        turns = TURN.findall(entry.text)
        assert "".join(f"]~b]{role}\n{body}[e~[\n" for role, body in turns) == entry.text[5:] + "\n", (
            entry.name
        )
        roles = [role for role, _ in turns]
        assert roles[:3] == ["system", "user", "ai"] and roles[-1] == "ai"
        declared = [
            json.loads(tool) for tool in re.findall(r"^<tool>(.*)</tool>$", turns[0][1], re.MULTILINE)
        ]
        required = {tool["name"]: set(tool["parameters"]["required"]) for tool in declared}
        for (role, body), (following, _) in zip(turns[1:], [*turns[2:], ("user", "")], strict=True):
            called = (
                re.findall(r'<invoke name="([^"]+)">\n(.*?)</invoke>', body, re.DOTALL)
                if role == "ai"
                else []
            )
            assert (following == "tool") == bool(called), entry.name
            for name, arguments in called:
                assert (
                    set(re.findall(r'^<parameter name="([^"]+)">', arguments, re.MULTILINE)) == required[name]
                )
