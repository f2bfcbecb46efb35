"""Conversations of an agent that reads code, and of one that writes it."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from textmaking.catalogue import Pick
from textmaking.chat import Turn, choose, phrase, render

_WHERE = (
    "Which arguments does `{}` take, and what comes back?",
    "Where is `{}` defined, and what does it do?",
    "Find `{}` in the sources and explain it to me.",
    "I see calls of `{}`. What is it for? Look it up, please.",
    "Show me the code of `{}` and sum it up.",
)
_LOOK = (
    "Its definition has to be found first.",
    "I do not know the file. A search for the definition will show it.",
    "First I search for `def {}`, then I read the lines around it.",
    "I should look at the source instead of guessing what `{}` does.",
)
_READ = (
    "There it is, now to its body.",
    "The definition is in {}. I read it as a whole.",
    "One match, in {}. The lines from there on should hold the docstring and the code.",
)
_SUM = (
    "Signature and docstring are enough for an answer.",
    "The docstring says what it is for, the code agrees. I sum up both.",
    "I have what I need: the purpose, the parameters and the result.",
)


def _functions(text: str) -> Iterator[tuple[ast.FunctionDef, str, str]]:
    """(node, source, docstring) of the documented functions of a module."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)) and len(doc) > 120:
            lines = text.split("\n")[node.lineno - 1 : node.end_lineno]
            yield node, "\n".join(lines), doc


def _summary(doc: str) -> str:
    """The first paragraphs of a docstring, up to its parameters."""
    head = re.split(r"\n\s*(?:Parameters|Examples?|See Also|Notes|Returns?|References)\n|\n\s*>>>", doc)[0]
    return re.sub(r"\n(?!\n)\s*(?=\S)", " ", head.strip())


def reading(files: Sequence[tuple[str, str]], pick: Pick) -> Iterator[tuple[str, str]]:
    """The user asks for two functions; the model searches, reads the file, and answers with the docstring."""
    for path, text in files:
        turns: list[Turn] = []
        for node, source, doc in _functions(text):
            if not 900 <= len(source.encode()) <= 5000:
                continue
            name, first, last = node.name, node.lineno, node.end_lineno or node.lineno
            numbered = "\n".join(f"{first + i:5d}\t{line}" for i, line in enumerate(source.split("\n")))
            arguments = (
                ", ".join(f"`{a.arg}`" for a in node.args.args if a.arg not in ("self", "cls")) or "none"
            )
            folder = str(PurePosixPath(path).parent)
            turns += [
                Turn("user", phrase(_WHERE, pick, path, name).format(name)),
                Turn(
                    "ai",
                    thought=phrase(_LOOK, pick, path, name).format(name),
                    calls=[("search", {"pattern": f"def {name}\\(", "folder": folder})],
                ),
                Turn("tool", f"{path}:{first}: {source.split(chr(10))[0].strip()}"),
                Turn(
                    "ai",
                    thought=phrase(_READ, pick, name, path).format(path),
                    calls=[("read_file", {"path": path, "first": first, "last": last})],
                ),
                Turn("tool", numbered),
                Turn(
                    "ai",
                    f"`{name}` stands in `{path}`, lines {first} to {last}. {_summary(doc)}\n\nArguments: {arguments}.",
                    phrase(_SUM, pick, path, name),
                ),
            ]
            if len(turns) == 12:
                yield f"{path}#{name}", render(turns, path, name, tools=("search", "read_file"))
                turns = []


_WRITE = (
    "I need `{0}` in {1}: {2}",
    "Write a function `{0}` into `{1}`. {2}",
    "Please add `{0}` to `{1}`. What it has to do: {2}",
    "`{1}` lacks a function `{0}`. {2} Can you write it, with a docstring?",
)
_THINK_WRITE = (
    "The task is clear, I write it at once.",
    "The function needs a docstring with its parameters, then the body. I write the file.",
    "I begin with the signature, document each parameter, and handle the special cases first.",
)


def writing(files: Sequence[tuple[str, str]], pick: Pick) -> Iterator[tuple[str, str]]:
    """The user describes two functions; the model writes each into a file and runs the tests."""
    for path, text in files:
        turns: list[Turn] = []
        for node, source, doc in _functions(text):
            if not 900 <= len(source.encode()) <= 4500 or node.col_offset:
                continue
            name, count = node.name, choose(range(2, 40), path, node.name)
            written = {"path": path, "bytes": len(source.encode()), "lines": source.count("\n") + 1}
            turns += [
                Turn("user", phrase(_WRITE, pick, path, name).format(name, path, _summary(doc))),
                Turn(
                    "ai",
                    thought=phrase(_THINK_WRITE, pick, path, name),
                    calls=[("write_file", {"path": path, "content": source})],
                ),
                Turn(
                    "tool",
                    json.dumps(
                        {"path": path, "bytes": len(source.encode()), "lines": source.count("\n") + 1}
                    ),
                ),
                Turn("ai", calls=[("run_tests", {"folder": f"{PurePosixPath(path).parent}/tests"})]),
                Turn("tool", json.dumps({"passed": count, "failed": 0, "seconds": round(count * 0.07, 2)})),
                Turn(
                    "ai",
                    f"`{name}` is in `{path}` now, {written['lines']} lines, and all {count} tests pass.",
                ),
            ]
            if len(turns) == 12:
                yield f"{path}#{name}", render(turns, path, name, tools=("write_file", "run_tests"))
                turns = []
