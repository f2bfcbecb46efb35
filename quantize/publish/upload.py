"""To the hub, by huggingface_hub: exactly what was listed, models first and the card last, one commit for each model.

What the repository has already is not sent again, so an interrupted upload continues. A new repository is private
unless it is asked to be public.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...formats.errors import HubError
from ...formats.hub import settings
from ...formats.hub.endpoint import Endpoint, parse_endpoint, redacted, shown
from ...formats.watch import UNWATCHED, Watch
from .folder import Item, Listing

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

AGAIN = "run the same command again: what has arrived is kept"
_HINTS = {
    400: "the hub's words say what is wrong",
    401: "set HF_TOKEN to a token that may write, or log in with `hf auth login`",
    403: "the token may not write there: it needs the write permission, for an account that owns the repository",
    404: "check the name: it is owner/name, and the owner must exist",
    413: "the hub takes no file of this size",
    429: "the hub asks for a pause: wait some minutes, then run the same command again",
}


@dataclass(frozen=True)
class UploadOptions:
    """How a listing is sent. `public` makes a new repository public, and says that an old one may be."""

    public: bool = False
    message: str | None = None


@dataclass(frozen=True)
class Published:
    """What was sent now, what was there already, and where it stands."""

    repository: str
    address: str
    private: bool
    sent: tuple[str, ...]
    kept: tuple[str, ...]
    sent_bytes: int

    def as_json(self) -> dict[str, Any]:
        """What `publish --json` prints."""
        return {**vars(self), "sent": list(self.sent), "kept": list(self.kept)}


def upload(listing: Listing, options: UploadOptions = UploadOptions(), watch: Watch = UNWATCHED) -> Published:
    """Send what the repository does not have yet; HubError where the hub does not take it.

    A file that changes after it was listed ends the upload before it is committed.
    """
    endpoint = parse_endpoint(settings.address())
    api, repository = _api(endpoint), listing.repository
    address = f"{shown(endpoint.url)}/{repository}"
    with _hub_errors(address):
        private = _repository(api, repository, options.public, address)
        there = _there(api, repository)
        todo = [item for item in listing.items if there.get(item.name) not in _names_of(item)]
        kept = [item for item in listing.items if item not in todo]
        done = sum(item.size for item in kept)
        watch.begin("uploading", listing.size, "bytes", done)
        for batch in _batches(todo):
            _send(api, repository, batch, options.message or _message(batch), watch)
    names = tuple(item.name for item in todo)
    sizes = sum(item.size for item in todo)
    return Published(repository, address, private, names, tuple(item.name for item in kept), sizes)


def _api(endpoint: Endpoint) -> HfApi:
    """huggingface_hub at the hub's address, with its token; HubError where it could not write."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if settings.offline():
        raise HubError("HF_HUB_OFFLINE forbids the network", hint="unset it to publish")
    disable_progress_bars()
    if endpoint.password is not None:
        return HfApi(endpoint.url, token=False, headers={"authorization": f"Basic {endpoint.password}"})
    if get_token() is None:
        raise HubError("publishing needs a token, and none is set", hint=_HINTS[401])
    return HfApi(endpoint.url)


def _repository(api: HfApi, repository: str, public: bool, address: str) -> bool:
    """Make the repository where there is none; whether it is private."""
    api.create_repo(repository, private=not public, exist_ok=True)
    private = bool(api.model_info(repository).private)
    if not private and not public:
        raise HubError(
            "is public, and a private upload was asked for",
            file=address,
            hint="give --public to publish there, or another name",
        )
    return private


def _there(api: HfApi, repository: str) -> dict[str, str | None]:
    """{name: hash} of what the repository holds: the SHA-256 of large files, git's name of small ones."""
    siblings = api.model_info(repository, files_metadata=True).siblings or []
    return {s.rfilename: s.lfs.sha256 if s.lfs else s.blob_id for s in siblings}


def _names_of(item: Item) -> tuple[str, ...]:
    """Under which hashes the hub would know an item: its SHA-256, and, for what is made or small, git's name."""
    from huggingface_hub.utils.sha import git_hash

    if item.is_model:
        return (item.sha256,)
    return item.sha256, git_hash(_content(item))


def _content(item: Item) -> bytes:
    if item.content is not None:
        return item.content
    assert item.file is not None
    return item.file.path.read_bytes()


def _batches(items: list[Item]) -> Iterator[list[Item]]:
    """One model at a time, then everything else together: a card never names a file that is not there yet."""
    for item in items:
        if item.is_model:
            yield [item]
    others = [item for item in items if not item.is_model]
    if others:
        yield others


def _send(api: HfApi, repository: str, batch: list[Item], message: str, watch: Watch) -> None:
    additions = [_addition(item) for item in batch]
    for item, addition in zip(batch, additions, strict=True):
        watch.advance(0, item.name)
        api.preupload_lfs_files(repository, [addition])
        if item.file is not None:
            item.file.check()
    api.create_commit(repository, additions, commit_message=message)
    for item in batch:
        watch.advance(item.size, item.name)


def _addition(item: Item) -> CommitOperationAdd:
    """The operation that adds an item, whose bytes the hub holds against the hash that was listed."""
    from huggingface_hub import CommitOperationAdd

    source = item.content if item.file is None else str(item.file.path.absolute())
    addition = CommitOperationAdd(item.name, source if source is not None else b"")
    addition.upload_info.sha256 = bytes.fromhex(item.sha256)
    return addition


def _message(batch: list[Item]) -> str:
    return f"Add {batch[0].name}" if len(batch) == 1 else f"Add the card and {len(batch) - 1} more files"


@contextmanager
def _hub_errors(address: str) -> Iterator[None]:
    """HubError, with what to do, for whatever huggingface_hub raises of the network and of answers."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HubError:
        raise
    except Exception as e:
        chain = [e, *_causes(e)]
        answer = next((link for link in chain if isinstance(link, HfHubHTTPError)), None)
        if answer is not None:
            status = answer.response.status_code
            said = redacted(answer.server_message or "").strip().partition("\n")[0][:200]
            words = f": {said}" if said else ""
            hint = _HINTS.get(status, AGAIN)
            raise HubError(f"the hub answered {status}{words}", file=address, hint=hint) from e
        if any(type(link).__module__.startswith("httpx") for link in chain):
            said = redacted(chain[-1]).partition("\n")[0][:200]
            raise HubError(f"the connection failed: {said}", file=address, hint=AGAIN) from e
        if isinstance(e, ValueError):  # an answer in a form that is none of the hub's
            said = redacted(e).partition("\n")[0][:200]
            raise HubError(
                f"the hub's answer makes no sense: {said}",
                file=address,
                hint="HF_ENDPOINT may name something else than a hub",
            ) from e
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What an error was raised from, to the first of all."""
    link = error.__cause__ or error.__context__
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
