"""Chat templates: which one a file means, and the prompt that it makes of a message."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import TokenError
from ..text import shown
from . import render

DEFAULT = "default"
SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
    "additional_special_tokens",
)
"""Keys of tokenizer_config.json that a template may use as variables."""
SECONDS = 15
"""How long a template may run. A usual one takes less than a second, the start of its process included."""


def chat_template(config: Mapping[str, Any] | None, file: str | Path) -> str | None:
    """The chat template of a tokenizer_config.json, or None where it has none; TokenError where it names no default.

    `chat_template` is a text, or names several: an object, or a list of {name, template}. Of several it is the one
    called `default`, or the only one.
    """
    found = (config or {}).get("chat_template")
    if isinstance(found, list):
        pairs = [(e.get("name"), e.get("template")) for e in found if isinstance(e, Mapping)]
        found = {name: template for name, template in pairs if isinstance(name, str)}
    if isinstance(found, Mapping):
        named = {str(name): template for name, template in found.items() if isinstance(template, str)}
        if DEFAULT not in named and len(named) > 1:
            raise TokenError(
                f"has chat templates called {', '.join(shown(name, 40) for name in list(named)[:8])}, none {DEFAULT!r}",
                file=file,
            )
        found = named.get(DEFAULT, next(iter(named.values()), None))
    return found if isinstance(found, str) else None


def render_chat(config: Mapping[str, Any], messages: Sequence[Mapping[str, str]], file: str | Path) -> str:
    """The prompt that a tokenizer_config.json's chat template makes of messages, ready for an answer; TokenError.

    The template may use what the transformers package offers to it. It runs in a sandbox of its own process, with
    bounds on its time, its memory and the length of what it writes.
    """
    template = chat_template(config, file)
    if template is None:
        raise TokenError("has no chat template", file=file)
    variables = {
        **{name: token for name in SPECIAL_TOKENS if (token := _token(config.get(name))) is not None},
        "messages": list(messages),
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
    }
    command = [sys.executable, "-P", render.__file__]
    request = json.dumps({"template": template, "variables": variables})
    answer = _answer(command, request.encode())
    if "text" not in answer:
        raise TokenError(f"its chat template cannot be used: {answer['problem']}", file=file)
    return answer["text"]


def _answer(command: Sequence[str], request: bytes) -> dict[str, str]:
    """What the program says: the `text`, or the `problem`."""
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"problem": f"it runs for more than {SECONDS} seconds"}
    except OSError as e:
        return {"problem": f"{command[0]} cannot be started: {e.strerror}"}
    try:
        answer: dict[str, str] = json.loads(done.stdout)
    except ValueError:
        ended = (
            f"by signal {-done.returncode}" if done.returncode < 0 else f"with exit code {done.returncode}"
        )
        return {"problem": f"the program that runs it ended {ended}"}
    return answer


def _token(value: Any) -> str | list[str] | None:
    """A special token, which is a text or an object with its `content`; a list of these; None for anything else."""
    if isinstance(value, Mapping):
        value = value.get("content")
    if isinstance(value, list):
        return [token for token in map(_token, value) if isinstance(token, str)]
    return value if isinstance(value, str) else None
