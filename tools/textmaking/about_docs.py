"""Conversations about documentation, and translations of the messages of a program."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from textmaking.catalogue import Pick
from textmaking.chat import Turn, choose, phrase, render

_ASK = {
    "english": (
        "What should I know about “{}”?",
        "Please explain “{}” in {}.",
        "I am new to {1}. What does its manual say about “{0}”?",
        "Can you tell me more about “{}”? I use {}.",
        "How does “{}” work in {}?",
        "Give me the section “{}” of the documentation of {}.",
        "I have a question about {1}: “{0}”. What matters there?",
    ),
    "chinese": (
        "请讲讲“{}”。",
        "请解释一下“{}”（{}）。",
        "在 {1} 里，“{0}”是怎么回事？",
        "我正在学习 {1}，想了解“{0}”。",
    ),
}
_PLAN = {
    "english": (
        "They want the part on {}. I recall it and keep its examples.",
        "The question is about {}. The manual of {} has a section on it; I give what it says, with its examples.",
        "So this is about {}. First the idea, then the details that the documentation of {} names.",
        "{1} documents {0} well. I answer along that section.",
    ),
    "chinese": (
        "这是关于{}的问题。",
        "用户想了解{}。我先说明用途，再给出 {} 文档中的细节。",
        "问题涉及 {1} 的{0}，按文档的顺序回答。",
    ),
}
_HEADING = re.compile(
    r"^(?:#{1,4} +(?P<md>.+)|(?P<rst>\S.*)\n(?P<line>[=\-~^\"*+`'])(?P=line){2,})$", re.MULTILINE
)


def sections(files: Sequence[tuple[str, str]], pick: Pick) -> Iterator[tuple[str, str]]:
    """Three or four sections of a page, each the answer to a question; the page's other sections follow likewise."""
    for path, text in files:
        marks = list(_HEADING.finditer(text))
        found = []
        for mark, following in zip(marks, [*marks[1:], None][: len(marks)], strict=True):
            body = text[mark.end() : following.start() if following else len(text)].strip("\n")
            title = re.sub(r"[`*]|:\w+:", "", mark["md"] or mark["rst"]).strip()
            if 500 <= len(body.encode()) <= 3500 and len(title) < 80:
                found.append((title, body))
        size = 3 + choose((0, 1), path)
        for first in range(0, len(found) - 2, size):
            turns = []
            for title, body in found[first : first + size]:
                question = phrase(_ASK[pick.language], pick, path, title).format(title, pick.source)
                plan = phrase(_PLAN[pick.language], pick, title, path).format(title, pick.source)
                turns += [Turn("user", question), Turn("ai", body, plan)]
            yield f"{path}#{first}", render(turns, path, first)


_LANGUAGES = {
    "de": "German",
    "es": "Spanish",
    "fr": "French",
    "ja": "Japanese",
    "ko": "Korean",
    "pt": "Portuguese",
    "ru": "Russian",
    "zh_Hans": "Chinese",
}


def translation(files: Sequence[tuple[str, list[tuple[str, str]]]], pick: Pick) -> Iterator[tuple[str, str]]:
    """The user gives English messages of a program; the model answers with their translations.

    A message is translated into one language only, so that the English ones are not repeated.
    """
    for code, language in _LANGUAGES.items():
        pairs = {a: b for path, some in files if f"/locale/{code}/" in path for a, b in some}
        good = [(a, b) for a, b in pairs.items() if 25 <= len(a) <= 240 and "\n" not in a]
        good = [(a, b) for a, b in good if choose(list(_LANGUAGES), a) == code]
        for first in range(0, len(good) - 10, 24):
            some = good[first : first + 24]
            asked = "\n".join(f"{i}. {a}" for i, (a, _) in enumerate(some, 1))
            told = "\n".join(f"{i}. {b}" for i, (_, b) in enumerate(some, 1))
            turns = [
                Turn(
                    "user",
                    f"Translate these messages of a program into {language}; keep the placeholders.\n\n{asked}",
                ),
                Turn("ai", told, f"{len(some)} messages, {language}, placeholders as they are."),
            ]
            yield f"{code}#{first}", render(turns, code, first)
