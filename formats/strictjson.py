"""JSON from files that nobody vouches for: one object, read strictly, with bounded depth and size.

Two readers must never see two different things in one file. Repeated keys, NaN, numbers beyond all readers (1e999) and
lone surrogates are therefore refused. A JsonError names no file: callers turn it into their own error.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn

from . import lfs
from .text import shown

DEPTH_LIMIT = 127
"""Nested objects and arrays; deeper ones are refused by the engine's JSON reader too."""

EMBEDDED_DEPTH = DEPTH_LIMIT - 7
"""The depth of a file that becomes a part of a file's metadata, which must not be deeper than DEPTH_LIMIT itself."""

DIGITS_LIMIT = 308
"""Digits of a whole number; readers that make a float of a large one know none beyond 1.8e308."""

TOKEN_LIMIT = 1 << 22
"""Strings, objects and arrays that a scanned object may hold, each of which costs far more memory than file."""

_STRING_BODY = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_STRUCTURE = re.compile(rb'["{}\[\]]')
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_STEP = {ord("{"): 1, ord("["): 1, ord("}"): -1, ord("]"): -1}
_BRACE = {ord("{"): 1, ord("}"): -1}


class JsonError(ValueError):
    """The text is not one strict JSON object."""


class ObjectScanner:
    """Finds the end of the JSON object at the head of a byte stream, in which other bytes may follow.

    The scanner counts braces outside strings, as the engine's readers do. Of what stands inside, it checks the depth.
    """

    def __init__(self) -> None:
        self.buffer = bytearray()
        self._at = 0
        self._depth = 0
        self._braces = 0
        self._tokens = 0
        self._in_string = False

    def feed(self, chunk: bytes) -> int | None:
        """Take the stream's next bytes; return the object's length once its last brace was seen, else None.

        Raises JsonError where the stream does not begin with a brace or nests deeper than DEPTH_LIMIT.
        """
        self.buffer += chunk
        buffer = self.buffer
        if buffer and buffer[0] != ord("{"):
            raise JsonError("does not begin with '{'")
        while self._at < len(buffer):
            if self._in_string:
                self._at = self._string_end(self._at)
                if self._at == len(buffer) or buffer[self._at] != ord('"'):
                    return None  # the string goes on, perhaps in the middle of an escape
                self._in_string = False
                self._at += 1
                continue
            match = _STRUCTURE.search(buffer, self._at)
            if match is None:
                self._at = len(buffer)
                return None
            byte, self._at = buffer[match.start()], match.end()
            self._in_string = byte == ord('"')
            self._depth += _STEP.get(byte, 0)
            self._braces += _BRACE.get(byte, 0)
            self._tokens += 1
            if self._tokens > 2 * TOKEN_LIMIT:
                raise JsonError(f"holds more than {TOKEN_LIMIT} strings, objects and arrays")
            if self._depth > DEPTH_LIMIT or self._braces > DEPTH_LIMIT:
                raise JsonError(f"nests deeper than {DEPTH_LIMIT} levels")
            if self._braces == 0:
                return self._at
        return None

    def _string_end(self, start: int) -> int:
        match = _STRING_BODY.match(self.buffer, start)
        return match.end() if match else start


def object_end(raw: bytes) -> int | None:
    """Where the object at the head of `raw` ends for a reader that counts braces, None if it does not; JsonError."""
    return ObjectScanner().feed(raw)


def parse_object(raw: bytes, depth: int = DEPTH_LIMIT) -> dict[str, Any]:
    """Parse bytes that are exactly one JSON object (white space around it allowed), nested at most `depth` levels.

    Raises JsonError otherwise.
    """
    if lfs.is_pointer(raw):
        raise JsonError(f"{lfs.PROBLEM}; {lfs.HINT}")
    if raw.startswith(codecs.BOM_UTF8):
        raise JsonError("begins with a byte order mark, which is not JSON; save it as UTF-8 without one")
    try:
        text = raw.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_bounded_int,
        )
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise JsonError("holds a lone surrogate, which is not a character") from None
    except UnicodeDecodeError as e:
        raise JsonError(f"is not UTF-8 at byte {e.start}") from None
    except RecursionError:
        raise JsonError("nests deeper than any reader follows") from None
    except JsonError:
        raise
    except ValueError as e:
        raise JsonError(f"is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise JsonError("is not a JSON object")
    if _nests_deeper(value, depth):
        raise JsonError(f"nests deeper than {depth} levels")
    return value


def dump_object(value: Mapping[str, Any]) -> bytes:
    """Serialise an object compactly, keys in the given order; JsonError for what strict JSON cannot hold."""
    raw = compact(value)
    if object_end(raw) != len(raw):
        raise JsonError("is not one object")
    parse_object(raw)
    return raw


def compact(value: Mapping[str, Any]) -> bytes:
    """The bytes of `dump_object`, not held against its limits, for those who only want to know how many there are."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as e:
        raise JsonError(f"cannot be written as JSON: {e}") from None


def _nests_deeper(value: Any, limit: int) -> bool:
    """Whether objects and arrays in `value` nest more than `limit` levels, found level by level."""
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise JsonError(f"repeats the key {shown(repeated)}")
    return out


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(f"holds the number {text[:40]}, which is beyond every float")
    return value


def _bounded_int(text: str) -> int:
    if len(text) > DIGITS_LIMIT:
        raise JsonError(
            f"holds a number of {len(text)} digits, which is not JSON that other programs can read"
        )
    return int(text)


def _refuse_constant(name: str) -> NoReturn:
    raise JsonError(f"holds {name}, which is not JSON")


def finite(value: Any) -> Any:
    """A value for strict JSON: numbers that JSON lacks (NaN and the infinities) become None."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
