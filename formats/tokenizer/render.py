"""Runs one chat template: {"template", "variables"} as JSON on stdin, {"text"} or {"problem"} as JSON on stdout.

`chat` starts this file as a program of its own, since a template may be written by a stranger: it may loop for ever or
make gigabytes. The sandbox is the one of the transformers package, for which templates are written, and so is what they
may use: loop controls, {% generation %}, tojson with its options, raise_exception and strftime_now.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any

CPU_SECONDS = 60
"""The last resort: `chat` waits for less, but may itself be killed meanwhile."""
MEMORY = 1 << 30
TEXT_LIMIT = 4 << 20
"""Characters of a prompt."""
PROBLEM_LIMIT = 300
NAME = "<template>"
"""The file name that jinja gives to a template made from a text."""


def main() -> None:
    """Answer the one request on stdin."""
    _limit_resources()
    request = json.load(sys.stdin)
    try:
        answer = {"text": render(request["template"], request["variables"])}
    except MemoryError:
        answer = {"problem": f"it needs more than {MEMORY >> 20} MiB of memory"}
    except RecursionError:
        answer = {"problem": "it nests too deeply"}
    except Exception as e:  # whatever a template does wrong
        answer = {"problem": _told(e)}
    json.dump(answer, sys.stdout)


def render(template: str, variables: dict[str, Any]) -> str:
    """The template's text; raises what jinja raises, and ValueError where the text becomes too long."""
    parts, length = [], 0
    for part in environment().from_string(template).generate(**variables):
        parts.append(part)
        length += len(part)
        if length > TEXT_LIMIT:
            raise ValueError(f"it makes a prompt of more than {TEXT_LIMIT} characters")
    return "".join(parts)


def environment() -> Any:
    """A jinja environment in which templates see what they see in the transformers package."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant says, for training programs; here it prints its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: Any) -> None:
        raise TemplateError(str(message))

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    found.filters["tojson"] = tojson
    found.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return found


def _told(e: Exception) -> str:
    """What went wrong, in one line, with the template's line where it is known."""
    line = getattr(e, "lineno", None)
    trace = e.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == NAME:
            line = trace.tb_lineno
        trace = trace.tb_next
    text = " ".join(str(e).split()) or type(e).__name__
    return f"line {line}: {text[:PROBLEM_LIMIT]}" if line else text[:PROBLEM_LIMIT]


def _limit_resources() -> None:
    import resource

    for kind, limit in ((resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_AS, MEMORY)):
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):  # a lower limit holds already, or the system has none
            continue


if __name__ == "__main__":
    main()
