"""What a file says of itself, for a report: tier, recipe, program, source and hashes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..formats.hfq import HfqFile
from ..formats.hfq.provenance import Provenance, stated_quantization_hash
from ..formats.strictjson import finite


@dataclass(frozen=True)
class FileFacts:
    """Read from the file's metadata alone, which may have been edited: None or empty where it does not say."""

    bytes: int
    tensors: int
    tier: str | None
    model: str | None
    program: str | None
    recipe: Mapping[str, Any]
    origin: Mapping[str, Any]
    source_files: Mapping[str, str]
    imatrix: str | None
    calibration: str | None
    calibration_tokens: int | None
    quantization_hash: str | None
    metadata_checksum: str | None

    @classmethod
    def of(cls, file: HfqFile) -> FileFacts:
        """The facts of an open file."""
        made = Provenance.of(file)
        program = " ".join(filter(None, (made.program.name, made.program.version)))
        commit = f" (commit {made.program.commit})" if made.program.commit else ""
        return cls(
            file.path.stat().st_size,
            len(file.entries),
            made.recipe.tier if made.recipe else None,
            made.recipe.model if made.recipe else None,
            f"{program}{commit}" if program else None,
            made.recipe.document if made.recipe else {},
            made.source.origin if made.source else {},
            made.source.files if made.source else {},
            made.imatrix.sha256 if made.imatrix else None,
            made.calibration.sha256 if made.calibration else None,
            made.calibration_tokens,
            stated_quantization_hash(file.metadata),
            made.metadata_checksum,
        )

    def as_json(self) -> dict[str, Any]:
        """The facts; numbers that JSON lacks become null."""
        return dict(finite(asdict(self)))
