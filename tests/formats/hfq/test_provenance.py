"""What a file says of itself, whoever wrote or edited it: foreign types read as absent, and nothing raises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mq_quant.formats.hfq import Provenance, open_hfq, write_hfq
from mq_quant.formats.hfq.provenance import stated_quantization_hash

SHA = "ab" * 32
RECORD: dict[str, Any] = {
    "schema": 1,
    "program": {"name": "mq-quant", "version": "0.1.0", "commit": None},
    "recipe": {
        "tier": "mq2",
        "fit": "hessian",
        "model": {"name": "M", "source": {"repository": "a/b"}},
        "awq": {"fold_down": 0.5},
    },
    "source": {"origin": {"folder": "x"}, "files": {"config.json": {"bytes": 3, "sha256": SHA}}},
    "imatrix": {"sha256": SHA, "kind": "gguf"},
    "calibration": {"sha256": SHA},
    "layers": [{"layer": 0}],
    "checksums": {"algorithm": "xxh64", "values": "0123456789abcdef" * 2},
    "metadata_checksum": "00ff",
    "reserved": " " * 100,
}


def test_a_record_of_ours(tmp_path: Path) -> None:
    write_hfq(tmp_path / "x.mq2", {"mq_quant": RECORD, "quantization_hash": {"value": "aa"}}, [])
    with open_hfq(tmp_path / "x.mq2") as file:
        found = Provenance.of(file)
        assert stated_quantization_hash(file.metadata) == "aa"
    assert found.document == {key: value for key, value in RECORD.items() if key != "reserved"}
    assert (found.program.name, found.program.version, found.program.commit) == ("mq-quant", "0.1.0", None)
    assert found.recipe is not None
    assert (found.recipe.tier, found.recipe.fit, found.recipe.model) == ("mq2", "hessian", "M")
    assert found.recipe.repository == "a/b"
    assert found.recipe.folds_down
    assert found.source is not None
    assert found.source.files == {"config.json": SHA}
    assert found.imatrix is not None
    assert found.calibration is not None
    assert found.imatrix.sha256 == found.calibration.sha256 == SHA
    assert found.layers == ({"layer": 0},)
    assert found.checksums == ("0123456789abcdef",) * 2
    assert found.metadata_checksum == "00ff"


def test_a_file_without_a_record() -> None:
    found = Provenance.read({})
    assert not found.document
    assert found.recipe is found.source is found.imatrix is found.calibration is None
    assert found.layers == found.checksums == ()
    assert stated_quantization_hash({}) is None


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("foreign", [None, 5, "text", [1], {"a": 1}, True, 1.5, [], {}])
@pytest.mark.parametrize("path", list(places(RECORD)), ids=lambda p: ".".join(map(str, p)))
def test_any_place_may_hold_anything(path: tuple[Any, ...], foreign: Any) -> None:
    found = Provenance.read({"mq_quant": replaced(RECORD, path, foreign)})
    texts = (found.program.name, found.program.version, found.program.commit, found.metadata_checksum)
    assert all(text is None or isinstance(text, str) for text in texts)
    if found.recipe:
        assert all(
            isinstance(getattr(found.recipe, f.name), str | None)
            for f in fields(found.recipe)
            if f.name in ("tier", "fit", "model", "repository")
        )
    if found.source:
        assert all(isinstance(sha, str) for sha in found.source.files.values())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*RECORD, "files", "values", "sha256", "model"]), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(["mq_quant", "quantization_hash"]), json_values))
def test_no_metadata_raise(metadata: dict[str, Any]) -> None:
    Provenance.read(metadata)
    stated_quantization_hash(metadata)


def test_checksums_that_are_cut_are_none() -> None:
    assert Provenance.read({"mq_quant": {"checksums": {"values": "0123456789abcde"}}}).checksums == ()
