"""What files are compared with: the source that runs beside them, its saved predictions, or those of llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...formats.checkpoint.source import Source
from ...formats.errors import InputError
from ...formats.hfq import HfqFile
from ...formats.minimax import ModelConfig
from ...formats.plain_file import open_plain
from ...formats.statistics.moment_folder import config_record
from ...texts import EVALUATION_SHA256
from ...verify.evaluate.dense import DenseComparison, of_source
from ...verify.evaluate.llama_base import MAGIC, LlamaBase, open_llama_base
from ...verify.evaluate.saved_reference import SavedReference, open_reference
from ..calibrate.tokens import EVALUATION, TokenRequest, Tokens, load_tokens, token_record
from .result import ReferenceKind, TokensRecord


@dataclass(frozen=True)
class Reference:
    """`tokens` i32 [sequences, length] are what models are run on, `text` the SHA-256 of our own text where they are of
    that. `record` says whose predictions they are; just one of `source`, `saved` and `llama` is not None.
    """

    kind: ReferenceKind
    tokens: Tokens
    text: str | None
    record: Mapping[str, Any]
    source: Source | None = None
    saved: SavedReference | None = None
    llama: LlamaBase | None = None

    def tokens_record(self) -> TokensRecord:
        return TokensRecord(**token_record(self.tokens), text=self.text)

    def origin(self) -> dict[str, Any]:
        """Where the source lies: its repository and revision, or its folder's name."""
        source = self.record.get("source")
        origin = source.get("origin") if isinstance(source, Mapping) else None
        return dict(origin) if isinstance(origin, Mapping) else {}

    def source_files(self) -> dict[str, str]:
        """The SHA-256 of each file of the source, as far as the record states them."""
        source = self.record.get("source")
        files = source.get("files") if isinstance(source, Mapping) else None
        stated = files.items() if isinstance(files, Mapping) else ()
        found = {name: part.get("sha256") for name, part in stated if isinstance(part, Mapping)}
        return {name: sha256 for name, sha256 in found.items() if isinstance(sha256, str)}

    def comparison(self, models: int) -> DenseComparison:
        """How models are compared with saved predictions."""
        if self.llama is not None:
            return self.llama.comparison(models)
        assert self.saved is not None
        return of_source(self.saved, self.tokens, self.saved.vocabulary, models)

    def check_vocabulary(self, file: HfqFile, config: ModelConfig) -> None:
        """InputError where saved predictions are over another vocabulary than the file's."""
        found = self.saved or self.llama
        if found is not None and found.vocabulary != config.vocab_size:
            raise InputError(
                f"has a vocabulary of {config.vocab_size} tokens, the reference one of {found.vocabulary}",
                file=file.path,
                hint="the reference is of another model",
            )

    def signature(self) -> dict[str, Any]:
        """What decides the figures of every file, besides the file."""
        base = {"llama": self.llama.file.sha256()} if self.llama else {}
        return {"reference": self.kind, "tokens": token_record(self.tokens), "of": dict(self.record), **base}


def of_checkpoint(
    source: Source, request: TokenRequest, files: Mapping[str, Any], ids: Tokens | None = None
) -> Reference:
    """The source, on what is requested or on token ids; `files` is its fingerprint.

    Raises TokenError or CheckpointError where there are no such tokens.
    """
    tokens = load_tokens(source, request, EVALUATION) if ids is None else ids
    record = {
        "source": {"origin": dict(source.origin), "files": dict(files)},
        "config": config_record(source.config),
    }
    return Reference(
        "source",
        tokens,
        EVALUATION_SHA256 if request.bundled and ids is None else None,
        record,
        source=source,
    )


def of_file(path: Path, first: HfqFile) -> Reference:
    """Predictions that were saved by us or by llama.cpp, told apart by content.

    Whether llama.cpp has put a BOS before each chunk follows from the config of the first file. Raises InputError.
    """
    try:
        with open_plain(path) as f:
            head = f.read(len(MAGIC))
    except OSError as e:
        raise InputError(f"cannot be read: {e.strerror}", file=path) from None
    if head == MAGIC:
        base = open_llama_base(path)
        config = first.metadata.get("config")
        bos = config.get("bos_token_id") if isinstance(config, Mapping) else None
        tokens = base.begun_with(bos if type(bos) is int else None)
        return Reference("llama.cpp", tokens, None, {"source": {"origin": {"file": path.name}}}, llama=base)
    saved = open_reference(path)
    text = saved.record.get("text")
    return Reference(
        "saved", saved.tokens, text if isinstance(text, str) else None, saved.record, saved=saved
    )
