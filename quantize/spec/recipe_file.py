"""Recipe files: YAML that is held to bounds before anything is made of it.

A recipe is a page of text. A file of megabytes, of thousands of keys, of deep nesting or of aliases that multiply is
not one, and is refused before it can take time or memory. What comes out is what JSON can hold, since a recipe is
stored in the files that are built with it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from ...formats.errors import RecipeError
from ...formats.plain_file import open_plain
from ...formats.strictjson import JsonError, dump_object
from ...formats.text import printable, shown

MAX_BYTES = 256 << 10
MAX_VALUES = 10_000
"""Keys and values of a recipe, those counted again that an alias repeats."""
MAX_DEPTH = 32
MAX_DIGITS = 40


def read_document(path: Traversable | Path) -> dict[str, Any]:
    """The mapping in a YAML file; RecipeError where it is unreadable, no mapping, or beyond the bounds."""
    where = str(path)
    try:
        with open_plain(path) if isinstance(path, Path) else path.open("rb") as f:
            text = f.read(MAX_BYTES + 1)
    except OSError as e:
        raise RecipeError(f"cannot be read: {e.strerror}", file=where) from None
    if len(text) > MAX_BYTES:
        raise RecipeError(f"is larger than {MAX_BYTES} bytes, so it is no recipe", file=where)
    try:
        document = yaml.load(text, Loader=_Loader)
    except Exception as e:  # PyYAML lets out whatever its scanner and Python's constructors raise
        what = "is no recipe" if isinstance(e, _TooMuch) else "is not valid YAML"
        raise RecipeError(f"{what}: {_told(e)}", file=where) from None
    if not isinstance(document, dict):
        raise RecipeError("is not a mapping of keys", file=where)
    try:
        dump_object(document)
    except JsonError as e:
        raise RecipeError(
            f"holds a value that a recipe cannot hold: {shown(str(e), 200)}", file=where
        ) from None
    return document


def check_size(document: Mapping[str, Any], where: str) -> None:
    """RecipeError where a document has more values than a recipe may have, whatever file it comes from."""
    left, count = [document], 0
    while left:
        part: Any = left.pop()
        inside = list(part.values()) if isinstance(part, Mapping) else part if isinstance(part, list) else []
        count += len(inside)
        if count > MAX_VALUES:
            raise RecipeError(f"holds more than {MAX_VALUES} values, so it is no recipe", file=where)
        left += inside


class _TooMuch(yaml.MarkedYAMLError):
    """The file is beyond the bounds."""


_TAG = "tag:yaml.org,2002:"
_TYPES = {None, *(_TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map"))}
"""What JSON has as well; None stands for all other tags, which are refused."""


class _Loader(yaml.SafeLoader):
    """Safe YAML within bounds, which refuses a key given twice, keys that are no text, and types that JSON lacks."""

    yaml_constructors = {  # noqa: RUF012
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in _TYPES
    }

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self._values = 0
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:
        """Begin a [list] or a {mapping}; the scanner reads ahead, and each open bracket makes its next step slower."""
        if self.flow_level >= MAX_DEPTH:
            raise _too_deep(self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose one node, counting it and all that it holds before anything is constructed."""
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise _refusal("an alias stands inside of what it repeats", mark)
            self._count(self._sizes[id(node)], mark)
            return node
        before = self._values
        self._count(1, mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _too_deep(mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._sizes[id(node)] = self._values - before
        return node

    def _count(self, values: int, mark: yaml.Mark) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            raise _TooMuch(None, None, f"it holds more than {MAX_VALUES} values", mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping whose keys are texts, each given once."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == _TAG + "merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _refusal(f"the key {shown(key)} is no text; put it in quotes", key_node.start_mark)
            if key in seen:
                raise _refusal(f"key {shown(key)} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    _check_digits(node)
    return int(loader.construct_yaml_int(node))


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> float:
    _check_digits(node)
    value = float(loader.construct_yaml_float(node))
    if not math.isfinite(value):
        raise _refusal(f"{shown(node.value)} is no finite number", node.start_mark)
    return value


def _check_digits(node: yaml.ScalarNode) -> None:
    if len(node.value) > MAX_DIGITS:
        raise _refusal(f"a number of {len(node.value)} characters, more than {MAX_DIGITS}", node.start_mark)


_Loader.add_constructor(_TAG + "int", _whole)
_Loader.add_constructor(_TAG + "float", _decimal)


def _told(error: Exception) -> str:
    """One line of what PyYAML says, with the line of the file."""
    problem = getattr(error, "problem", None) or str(error) or type(error).__name__
    mark = getattr(error, "problem_mark", None)
    return printable(" ".join(str(problem).split()))[:200] + (f" in line {mark.line + 1}" if mark else "")


def _too_deep(mark: yaml.Mark) -> _TooMuch:
    return _TooMuch(None, None, f"its values nest deeper than {MAX_DEPTH} levels", mark)


def _refusal(problem: str, mark: yaml.Mark) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)
