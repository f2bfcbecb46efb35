"""From `--source`, `--tier` and `--recipe` to the recipe and the model's files: folder, hub repository or `tiny`.

Readers of checkpoints are imported only where they are needed: a plan of a config.json needs none of them.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...formats.checkpoint.names import CONFIG, SIDE_FILES, TOKENIZER
from ...formats.errors import CheckpointError, ConfigError, RecipeError
from ...formats.hfq.layout import METADATA_LIMIT
from ...formats.lfs import HINT, PROBLEM, is_pointer
from ...formats.minimax import normalize_config, parse_config
from ...formats.plain_file import hint_of, open_plain
from ...formats.strictjson import EMBEDDED_DEPTH, JsonError, parse_object
from .metadata import SideFiles
from .recipe import DEFAULT_MODEL, Model, Place, Recipe, load_model, load_recipe, load_tier, models

if TYPE_CHECKING:
    from ...formats.checkpoint.source import Source as Checkpoint

TINY = "tiny"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_NAME = re.compile(r"[^\w.-]+")
_TAKES = "--source takes the folder of a checkpoint"


def choose_recipe(
    tier: str | None, path: Path | None, source: str | None, revision: str | None = None
) -> Recipe:
    """The recipe of `--tier` or `--recipe`; with a source of another name it is retargeted to that source.

    `revision` takes the place of the one that the recipe pins. Raises RecipeError where neither or both of tier and
    path are given, and where a revision is given for what is no hub repository.
    """
    if (tier is None) == (path is None):
        raise RecipeError("give either --tier or --recipe", hint="mq-quant tiers lists the tiers")
    if path is not None:
        recipe = load_recipe(path)
    else:
        assert tier is not None
        recipe = load_tier(tier, TINY if source == TINY else DEFAULT_MODEL)
    recipe = recipe if source is None else retarget(recipe, source)
    return recipe if revision is None else at_revision(recipe, revision)


def at_revision(recipe: Recipe, revision: str) -> Recipe:
    """The recipe with its source at a branch, tag or commit; RecipeError where the source is no hub repository."""
    place = recipe.model.place
    if place.repository in (None, TINY):
        raise _no_revision(place.address)
    model = recipe.model.model_copy(update={"place": place.model_copy(update={"revision": revision})})
    return recipe.model_copy(update={"model": model})


def _no_revision(place: str) -> RecipeError:
    return RecipeError(
        f"--revision goes with a hub repository, and {place} is none",
        hint="leave --revision out, or give --source owner/name",
    )


def retarget(recipe: Recipe, source: str) -> Recipe:
    """The recipe for another source: its own model's place is left as it is, anything else replaces the model.

    A repository that a bundled model names brings that model. Any other model is named after its repository, also where
    a snapshot of huggingface_hub's cache is given, else after the folder.
    """
    if source == recipe.model.place.address:
        return recipe
    known = next((model for model in map(load_model, models()) if model.place.repository == source), None)
    if known is not None:
        return recipe.model_copy(update={"model": known, "quantization_hash": None})
    local = local_folder(source)
    name = _folder_name(local) if local else source.split("/")[-1]
    where = Place(folder=str(local)) if local else Place(repository=source)
    model = Model(name=_NAME.sub("-", name) or "model", source=where)
    return recipe.model_copy(update={"model": model, "quantization_hash": None})


def _folder_name(folder: Path) -> str:
    """What a model in a folder is called; a snapshot is named by a commit, which tells a person nothing."""
    from ...formats.hub.cache import snapshot_of

    known, path = snapshot_of(folder), folder.resolve()
    if known:
        return known[0].split("/")[-1]
    return path.parent.parent.name if path.parent.name == "snapshots" else path.name


@dataclass(frozen=True)
class ModelFiles:
    """What a plan needs to know of a model: its config.json and the texts that go into the file.

    `complete` is false where the texts are not at hand, so that metadata sizes are a little too small.
    """

    config: Mapping[str, Any]
    side: SideFiles
    complete: bool


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint; ConfigError where it is unreadable or not an object."""
    try:
        return parse_object(_content(path), EMBEDDED_DEPTH)
    except JsonError as e:
        raise ConfigError(str(e), file=path) from None


def read_text(path: Path) -> str:
    """A text file of the checkpoint, its line ends as "\\n"; ConfigError where it is unreadable or not UTF-8."""
    try:
        return _content(path).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        raise ConfigError(f"cannot be read as UTF-8 text: {e}", file=path) from None


def _content(path: Path) -> bytes:
    """The bytes of a file beside the weights; ConfigError where it is none, or larger than what a file can hold."""
    try:
        with open_plain(path) as f:
            raw = f.read(METADATA_LIMIT + 1)
    except OSError as e:
        raise ConfigError(f"cannot be read: {e.strerror}", file=path, hint=hint_of(e)) from None
    if len(raw) > METADATA_LIMIT:
        raise ConfigError(
            f"is larger than {METADATA_LIMIT} bytes, the most that the file's metadata holds", file=path
        )
    if is_pointer(raw):
        raise ConfigError(PROBLEM, file=path, hint=HINT)
    return raw


def side_files(find: Callable[[str], Path | None]) -> SideFiles:
    """The texts beside the weights, `find` giving their paths; tokenizer.json is kept as text, byte for byte."""

    def text(name: str) -> str | None:
        path = find(name)
        return read_text(path) if path else None

    def document(name: str) -> dict[str, Any] | None:
        path = find(name)
        return read_json(path) if path else None

    tokenizer = text(TOKENIZER)
    if tokenizer is not None:
        document(TOKENIZER)
    return SideFiles(
        tokenizer,
        document("tokenizer_config.json"),
        document("generation_config.json"),
        text("chat_template.jinja"),
    )


def local_folder(source: str) -> Path | None:
    """The folder that a source names on this machine (the tiny one is made on first use), or None for the hub.

    Raises CheckpointError where it is neither a folder nor a repository's name.
    """
    if source == TINY:
        from ..tiny.folder import ensure_tiny

        return ensure_tiny()
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file() and path.name == "config.json":
        return path.parent
    if path.is_file():
        beside = (path.parent / "config.json").is_file()
        hint = f"give {path.parent}" if beside else _TAKES
        raise CheckpointError("is a file, not a checkpoint's folder", file=path, hint=hint)
    if os.path.lexists(path):
        what = "is a link to nothing" if path.is_symlink() and not path.exists() else "is no folder"
        raise CheckpointError(what, file=path, hint=_TAKES)
    if _REPOSITORY.fullmatch(source) and not source.startswith((".", "/")):
        return None
    from ...formats.hub.endpoint import redacted

    near = difflib.get_close_matches(source, [TINY], n=1)
    raise CheckpointError(
        f"no such folder: {redacted(source)}",
        hint=f"--source takes a folder, a hub repository (owner/name) or {TINY!r}"
        + (f"; did you mean {near[0]!r}?" if near else ""),
    )


def open_place(place: str, revision: str | None, shard_cache: int, scratch: Path | None) -> Checkpoint:
    """The checkpoint in a folder or a hub repository, its inventory unchecked; streamed shards lie in `scratch`.

    RecipeError where a revision is given of a folder, which has none.
    """
    folder = local_folder(place)
    from ...formats.checkpoint.streamed import open_folder, open_hub

    if folder is not None:
        if revision is not None:
            raise _no_revision(place)
        return open_folder(folder)
    return open_hub(place, revision, shard_cache, scratch=scratch)


@contextmanager
def checked_place(
    place: str, revision: str | None, shard_cache: int, scratch: Path | None
) -> Iterator[Checkpoint]:
    """The same with its inventory checked, until the end of the block; raises the errors of `Source.validate`."""
    with closing(open_place(place, revision, shard_cache, scratch)) as opened:
        opened.validate()
        yield opened


def model_files(model: Model) -> ModelFiles:
    """Config and texts for planning: the recipe's own config where it has one, so that no network is needed."""
    if model.config is not None:
        return ModelFiles(normalize_config(model.config), SideFiles(), False)
    from ...formats.tokenizer import check_tokenizer

    folder = local_folder(model.place.address)
    names = (CONFIG, *SIDE_FILES)
    if folder is None:
        assert model.place.repository is not None
        from ...formats.hub.files import fetch_files

        files = fetch_files(model.place.repository, names, model.place.revision)
    else:
        files = {name: folder / name for name in names if (folder / name).is_file()}
    if CONFIG not in files:
        raise ConfigError("is missing", file=f"{model.place.address}/{CONFIG}")
    side = side_files(files.get)
    raw = read_json(files[CONFIG])
    try:
        parse_config(raw)
    except ConfigError as e:
        raise ConfigError(e.problem, file=files[CONFIG], hint=e.hint) from None
    check_tokenizer(files.get(TOKENIZER), raw["vocab_size"])
    return ModelFiles(raw, side, side.tokenizer is not None)
