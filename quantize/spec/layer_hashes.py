"""One hash for each layer of a tier, so that some layers can be made again and compared without the whole file.

A layer's hash is made of the names, formats, shapes and checksums of its tensors in file order. A table of such hashes
stands beside the recipes of a model. They are of builds under the recipe's imatrix: such a layer depends on the source
and the imatrix alone, and on no other layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...formats.errors import RecipeError
from ...formats.hfq import HfqFile, TensorMeta
from ...formats.hfq.provenance import Provenance
from ...formats.minimax import layer_prefix
from ...formats.plain_file import open_plain
from ...formats.strictjson import JsonError, parse_object
from .recipe import bundled_file, load_model, models

FILE = "layers.json"
LIMIT = 4 << 20
Layer = Annotated[int, Field(ge=0)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class HashTable(BaseModel):
    """Hashes by tier and layer. `revision` and `imatrix_sha256` say what they were made from, where that is known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = Field(alias="schema", ge=1, le=1)
    model: str
    revision: str | None = None
    imatrix_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    tiers: Mapping[str, Mapping[Layer, Hash]]

    def of(self, tier: str, layer: int) -> str | None:
        """The hash of a layer; None where nobody has committed one."""
        return self.tiers.get(tier, {}).get(layer)

    def with_hashes(self, found: Mapping[str, Mapping[int, str]]) -> HashTable:
        """The table with these hashes added, or put in place of what it had."""
        merged = {
            tier: dict(sorted({**self.tiers.get(tier, {}), **found.get(tier, {})}.items()))
            for tier in sorted({*self.tiers, *found})
        }
        return self.model_copy(update={"tiers": merged})

    def text(self) -> str:
        """The table as its file holds it."""
        return self.model_dump_json(by_alias=True, exclude_none=True, indent=1) + "\n"


def empty_table(model: str) -> HashTable:
    """The table of a model of which nobody has committed a hash."""
    return HashTable(schema=1, model=model, tiers={})


def read_table(path: Path) -> HashTable:
    """The table in a file; RecipeError where it is none."""
    try:
        with open_plain(path) as f:
            raw = f.read(LIMIT + 1)
        if len(raw) > LIMIT:
            raise RecipeError(f"is larger than {LIMIT} bytes, so it is no table of hashes", file=path)
        return HashTable.model_validate(parse_object(raw))
    except OSError as e:
        raise RecipeError(f"cannot be read: {e.strerror}", file=path) from None
    except (JsonError, ValidationError) as e:
        said = e.errors()[0]["msg"] if isinstance(e, ValidationError) else str(e)
        raise RecipeError(f"is no table of layer hashes: {said}", file=path) from None


def bundled_table(repository: str | None) -> HashTable | None:
    """The table of the bundled model whose place this repository is; None where there is no such model.

    A model without a file has an empty table.
    """
    for name in models():
        model = load_model(name)
        if repository is not None and model.place.repository == repository:
            path = bundled_file(name, FILE)
            return read_table(path) if path.is_file() else empty_table(model.name)
    return None


def layer_hash(tensors: Iterable[tuple[TensorMeta, str]]) -> str:
    """The hash of a layer's tensors in file order, each with the XXH64 of its payload."""
    digest = xxhash.xxh64(b"mq-quant layer\n")
    for meta, checksum in tensors:
        shape = "x".join(map(str, meta.shape))
        digest.update(f"{meta.name} {meta.quant_type} {shape} {checksum}\n".encode())
    value: str = digest.hexdigest()
    return value


def file_hashes(file: HfqFile) -> dict[int, str]:
    """The hash of each layer of a finished file, from the checksums that it states; empty where it states none."""
    checksums = Provenance.of(file).checksums
    if len(checksums) != len(file.entries):
        return {}
    layers: dict[int, list[tuple[TensorMeta, str]]] = {}
    prefix = layer_prefix(0).rpartition("0.")[0]
    for entry, checksum in zip(file.entries, checksums, strict=True):
        number = entry.name.removeprefix(prefix).partition(".")[0]
        if entry.name.startswith(prefix) and number.isdecimal():
            meta = TensorMeta(entry.name, entry.quant_type, entry.shape, entry.group_size, entry.nbytes)
            layers.setdefault(int(number), []).append((meta, checksum))
    return {layer: layer_hash(tensors) for layer, tensors in sorted(layers.items())}
