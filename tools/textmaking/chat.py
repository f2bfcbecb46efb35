"""The chat format of MiniMax-M2, the tools that conversations offer, and the choice of phrases.

The format: a system turn with the tools as JSON schemas, then turns of the user, of the model (`ai`, which thinks
before it answers or calls tools) and of tools. Thoughts stand only after the user's last turn, as in the model's own
template. Phrases of evaluation conversations are never used in calibration ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from textmaking.catalogue import EVALUATION, Pick

BEGIN, ROLE, END = "]~!b[", "]~b]", "[e~[\n"
Call = tuple[str, dict[str, Any]]

SYSTEMS = (
    "You are a helpful assistant. Your name is MiniMax-M2.7 and is built by MiniMax.",
    "You are a careful assistant. Answer briefly and say where your knowledge comes from.",
    "You help engineers to read and write software. Prefer the tools to your memory.",
    "You answer questions of people who learn. Explain the reason before the rule.",
)


@dataclass
class Turn:
    role: str
    content: str = ""
    thought: str = ""
    calls: list[Call] = field(default_factory=list)


def choose(options: Sequence[Any], *key: object) -> Any:
    """One of the options, the same for the same key on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return options[int.from_bytes(digest[:8], "big") % len(options)]


def phrase(options: Sequence[str], pick: Pick, *key: object) -> str:
    """One of the phrases: the first is for evaluation, the others for calibration."""
    chosen: str = options[0] if pick.use == EVALUATION else choose(options[1:], *key)
    return chosen


def _schema(name: str, description: str, **parameters: tuple[str, str]) -> dict[str, Any]:
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"name": name, "description": description, "parameters": schema}


TOOLS = {
    tool["name"]: tool
    for tool in (
        _schema(
            "search",
            "Search the files of the project for a regular expression.",
            pattern=("string", "What to look for"),
            folder=("string", "Folder to search in"),
        ),
        _schema(
            "read_file",
            "Read lines of a text file.",
            path=("string", "Path inside the project"),
            first=("integer", "First line, from 1"),
            last=("integer", "Last line"),
        ),
        _schema(
            "write_file",
            "Write a file anew.",
            path=("string", "Path inside the project"),
            content=("string", "The whole new content"),
        ),
        _schema(
            "run_tests",
            "Run the tests of a folder and return the summary.",
            folder=("string", "Folder with tests"),
        ),
        _schema(
            "get_country",
            "Return sections of a country's profile as JSON.",
            country=("string", "Name of the country in English"),
            fields=("array", "Names of the fields"),
        ),
        _schema(
            "calculate",
            "Evaluate an arithmetic expression exactly.",
            expression=("string", "An expression in Python's syntax"),
        ),
        _schema(
            "web_search",
            "Search the web and return titles, addresses and excerpts.",
            query=("string", "Keywords"),
            count=("integer", "How many results"),
        ),
        _schema(
            "get_weather",
            "Return the weather forecast for a place.",
            place=("string", "City and country"),
            day=("string", "Date as YYYY-MM-DD"),
        ),
        _schema(
            "send_message",
            "Send a message to a person of the team.",
            person=("string", "Who receives it"),
            text=("string", "The message"),
        ),
        _schema(
            "query_database",
            "Run a read-only SQL query and return rows as JSON.",
            sql=("string", "One SELECT statement"),
        ),
    )
}
EXTRA = ("web_search", "get_weather", "send_message", "query_database", "calculate", "run_tests")


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _system(text: str, tools: Sequence[str]) -> str:
    if not tools:
        return text
    shown = "\n".join(f"<tool>{json.dumps(TOOLS[name], ensure_ascii=False)}</tool>" for name in tools)
    return (
        f"{text}\n\n# Tools\nYou may call one or more tools to assist with the user query.\n"
        f"Here are the tools available in JSONSchema format:\n\n<tools>\n{shown}\n</tools>\n\n"
        "When making tool calls, use XML format to invoke tools and pass parameters:\n\n<minimax:tool_call>\n"
        '<invoke name="tool-name-1">\n<parameter name="param-key-1">param-value-1</parameter>\n'
        '<parameter name="param-key-2">param-value-2</parameter>\n...\n</invoke>\n</minimax:tool_call>'
    )


def _ai(turn: Turn, thinks: bool) -> str:
    text = f"<think>\n{turn.thought}\n</think>\n\n" if thinks and turn.thought else ""
    text += turn.content
    if turn.calls:
        text += "\n<minimax:tool_call>\n"
        for name, arguments in turn.calls:
            shown = "".join(f'<parameter name="{k}">{_value(v)}</parameter>\n' for k, v in arguments.items())
            text += f'<invoke name="{name}">\n{shown}</invoke>\n'
        text += "</minimax:tool_call>"
    return text


def render(turns: Sequence[Turn], *key: object, tools: Sequence[str] = ()) -> str:
    """The conversation as text. `key` chooses the system's words and one or two tools that are not needed."""
    offered = list(tools)
    if tools:
        offered += [name for name in (choose(EXTRA, *key, 1), choose(EXTRA, *key, 2)) if name not in offered]
        offered = sorted(set(offered), key=lambda name: hashlib.sha256(f"{name}{key}".encode()).digest())
    shown = [f"{BEGIN}{ROLE}system\n{_system(choose(SYSTEMS, *key), offered)}{END}"]
    last = max(i for i, turn in enumerate(turns) if turn.role == "user")
    for i, turn in enumerate(turns):
        content = _ai(turn, i > last) if turn.role == "ai" else turn.content
        if turn.role == "tool":
            content = f"<response>{content}</response>"
            if turns[i - 1].role == "tool":
                shown[-1] = f"{shown[-1].removesuffix(END)}\n{content}{END}"
                continue
        shown.append(f"{ROLE}{turn.role}\n{content}{END}")
    return "".join(shown).rstrip("\n")
