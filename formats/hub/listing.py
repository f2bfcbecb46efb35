"""One revision of a repository, as the hub describes it: its commit, and its files with sizes and hashes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urljoin

from ..errors import HubError
from .advice import about
from .answers import LOGIN, LOGIN_TRIES
from .endpoint import origin, shown
from .patience import AgainError
from .repository import Repository, is_commit, parse_files
from .session import Line, ask

LISTING_BYTES = 64 << 20
LISTING_PAGES = 1000
LISTING_SECONDS = 20.0
"""Seconds that one read may take: the hub works a while on the list of a large repository."""
_NEXT = re.compile(r'<([^>]*)>\s*;[^,]*\brel\s*=\s*"?next\b')


def resolve(line: Line, name: str, revision: str | None) -> Repository:
    """Fix a branch, tag or commit (None: the main branch) to one commit, and list its files. Raises HubError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as e:
        raise HubError(str(e), file=name, hint="a repository's name is owner/name") from None
    model = f"{line.endpoint.url}/api/models/{quote(name)}"
    at = f"/revision/{quote(revision, safe='')}" if revision else ""
    info, _ = _json(line, name, f"{model}{at}?blobs=true")
    commit = info.get("sha") if isinstance(info, dict) else None
    if not isinstance(commit, str) or not is_commit(commit):
        raise _not_the_hub(line, name)
    if revision and is_commit(revision) and commit != revision:
        hint = "HF_ENDPOINT may name a mirror that has only one revision"
        raise HubError(f"the hub answers with revision {commit}, not with {revision}", file=name, hint=hint)
    files = parse_files(name, _entries(line, name, info.get("siblings")))
    if files is None:
        files = parse_files(name, _tree(line, name, f"{model}/tree/{commit}?recursive=true"))
    if not files:
        raise _not_the_hub(line, name)
    return Repository(name, commit, files)


def _json(line: Line, what: str, url: str) -> tuple[Any, Mapping[str, str]]:
    """The JSON value that `url` answers with, and the answer's headers. Raises HubError."""

    def attempt() -> tuple[Any, Mapping[str, str]]:
        data = bytearray()
        with ask(line, what, url, LISTING_SECONDS) as answer:
            for chunk in answer.chunks:
                data.extend(chunk)
                if len(data) > LISTING_BYTES:
                    problem = f"the hub's list of files has more than {LISTING_BYTES} bytes"
                    raise HubError(problem, file=what)
        try:
            return json.loads(data), answer.headers
        except (ValueError, RecursionError):
            problem, host = "what answered does not speak the hub's API: it is not JSON", answer.asked.host
            hint = about(host, LOGIN)
            raise AgainError(problem, host=host, tries=LOGIN_TRIES, hint=hint, content=True) from None

    return line.retried(what, attempt)


def _tree(line: Line, what: str, url: str) -> Iterator[Any]:
    """The entries of the hub's long list of files, page after page: the short list of some mirrors lacks the sizes."""
    for _ in range(LISTING_PAGES):
        page, headers = _json(line, what, url)
        yield from _entries(line, what, page)
        following = _NEXT.search(headers.get("link", ""))
        if following is None:
            return
        url = urljoin(url, following[1])
        if origin(url) != origin(line.endpoint.url):  # a mirror that passes on the public hub's address
            url = line.endpoint.url + "/api/" + url.partition("/api/")[2]
    raise HubError(f"the hub's list of files has more than {LISTING_PAGES} pages", file=what)


def _entries(line: Line, what: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _not_the_hub(line, what)
    return value


def _not_the_hub(line: Line, what: str) -> HubError:
    problem = "the hub states no commit, or no files, for this repository"
    return HubError(
        f"{problem}; the address is {shown(line.endpoint.url)}",
        file=what,
        hint=about(line.endpoint.url, LOGIN),
    )
