"""diff and inspect on real builds: what is equal is called equal, and what differs is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mq_quant.formats.errors import HfqError, HfqKind, RecipeError
from mq_quant.formats.hfq import TensorMeta, open_hfq, write_hfq
from mq_quant.quantize.inspect.diff import EQUAL_DB, diff_files
from mq_quant.quantize.inspect.show import inspect_file, provenance
from mq_quant.quantize.pipeline.build import BuildResult

Run = Callable[..., BuildResult]
W1 = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
GOLDEN = Path(__file__).parents[2] / "golden" / "container.hfq"


def altered(path: Path, name: str, tmp_path: Path, at: int = 10) -> Path:
    """A copy of a file with one bit of one tensor flipped."""
    with open_hfq(path) as file:
        offset = file.entry(name).offset
    data = bytearray(path.read_bytes())
    data[offset + at] ^= 1
    copy = tmp_path / "altered"
    copy.write_bytes(data)
    return copy


def test_a_file_is_identical_to_itself(run: Run, tmp_path: Path) -> None:
    count = run("a").tensor_count
    result = diff_files(tmp_path / "a", tmp_path / "a")
    assert result.identical
    assert result.equal_tensors == count


def test_one_flipped_bit_is_one_different_tensor(run: Run, tmp_path: Path) -> None:
    run("a")
    result = diff_files(tmp_path / "a", altered(tmp_path / "a", W1, tmp_path))
    assert not result.identical
    (row,) = result.different_tensors
    assert row.name == W1
    assert row.snr_db is not None and row.snr_db > 3


def test_scales_and_formats_are_seen_through(run: Run, tmp_path: Path) -> None:
    run("a", tier="mq4", alpha=0.0, gain=False)
    run("b", tier="mq3", alpha=0.5, gain=False)
    result = diff_files(tmp_path / "a", tmp_path / "b")
    keys = {row.key for row in result.metadata}
    assert {"mq_quant.recipe.awq.alpha", "mq_quant.recipe.tier", "quantization_hash.value"} <= keys
    assert not any("checksums" in key or "reserved" in key for key in keys)
    rows = {row.name: row for row in result.different_tensors}
    assert (rows[W1].format_a, rows[W1].format_b) == ("MQ4", "MQ3-Lloyd")
    assert 8 < (rows[W1].snr_db or 0) < 20
    assert "model.embed_tokens.weight" not in rows


def test_a_folded_scale_is_seen_through(run: Run, tmp_path: Path) -> None:
    """Two builds that differ in the fold alone are as near to a third, and to each other, as their roundings are."""
    for name, tier, fold in (("fine", "mq4", 0.0), ("plain", "mq3", 0.0), ("folded", "mq3", 0.5)):
        run(name, tier=tier, fold_down=fold, gain=False)

    def snr(a: str, b: str) -> dict[str, float]:
        rows = diff_files(tmp_path / a, tmp_path / b).different_tensors
        return {row.name: row.snr_db for row in rows if row.snr_db is not None}

    plain, folded = snr("fine", "plain"), snr("fine", "folded")
    assert plain.keys() == folded.keys() and len(plain) == 18
    for name, of_plain in plain.items():
        # Only w2 is rounded anew; in the same basis its error is spread a little differently over the columns.
        assert folded[name] == pytest.approx(of_plain, abs=1.5 if ".w2." in name else 0.01), name
    for pair in (("plain", "folded"), ("folded", "plain")):
        found = snr(*pair)
        assert {name.split(".")[-2] for name in found} == {"w2", "w3"}, "w1 takes no part in a fold"
        for name, value in found.items():
            assert value == EQUAL_DB if ".w3." in name else 9.5 < value < 13, name
    # The signal is that of the first file, and a folded one has a little more or less of it.
    assert snr("plain", "folded") == pytest.approx(snr("folded", "plain"), abs=0.2)


def test_tensors_on_one_side_only_and_unknown_formats_are_listed(run: Run, tmp_path: Path) -> None:
    run("a")
    with open_hfq(tmp_path / "a") as file:
        metas = [(e, file.read(e.name)) for e in file.entries if e.name != W1]
        write_hfq(tmp_path / "b", file.metadata_bytes, metas)
    result = diff_files(tmp_path / "a", tmp_path / "b")
    assert result.only_a == (W1,)
    assert not result.identical
    assert diff_files(tmp_path / "b", tmp_path / "a").only_b == (W1,)


def test_inspect_lists_filters_and_decodes(run: Run, tmp_path: Path) -> None:
    built = run("a", tier="mq2-lloyd")
    result = inspect_file(tmp_path / "a", r"experts\.1\.w1", W1, groups=3)
    assert result.header.total_bytes == (tmp_path / "a").stat().st_size == built.total_bytes
    assert result.metadata.tier == "mq2-lloyd"
    assert result.metadata.quantization_hash == built.quantization_hash
    assert [row.name for row in result.tensors] == [W1, W1.replace("layers.0", "layers.1")]
    assert result.tensors[0].format == "MQ2-Lloyd"
    tensor = result.tensor
    assert tensor is not None
    assert (len(tensor.first_groups), len(tensor.first_groups[0])) == (3, 256)
    assert all(len(set(group)) <= 4 for group in tensor.first_groups)
    assert tensor.statistics.finite
    with open_hfq(tmp_path / "a") as file:
        assert np.isclose(tensor.statistics.weights, np.prod(file.entry(W1).shape))


def test_inspect_reads_files_of_other_programs(tmp_path: Path) -> None:
    result = inspect_file(GOLDEN)
    assert result.header.tensor_count == 3
    assert result.metadata.tier is None
    with pytest.raises(HfqError, match="holds no provenance") as e:
        provenance(GOLDEN)
    assert e.value.kind is HfqKind.PROVENANCE


def test_bytes_after_the_last_tensor_are_shown_and_compared(tmp_path: Path) -> None:
    copies = [tmp_path / name for name in ("a", "b", "c")]
    for path, rest in zip(copies, (b"x" * 300, b"x" * 300, b"y" * 300), strict=True):
        path.write_bytes(GOLDEN.read_bytes() + rest)
    assert inspect_file(copies[0]).header.trailing_bytes == 300
    plain = diff_files(GOLDEN, copies[0])
    assert not plain.identical
    assert (plain.trailing_a, plain.trailing_b, plain.equal_tensors) == (0, 300, 3)
    assert diff_files(*copies[:2]).identical
    assert not diff_files(*copies[1:]).identical


@pytest.mark.parametrize("value", [None, 5, "text", [1], True])
@pytest.mark.parametrize("key", ["config", "tokenizer", "tokenizer_config", "mq_quant", "quantization_hash"])
def test_metadata_of_other_types_are_shown(key: str, value: Any, tmp_path: Path) -> None:
    write_hfq(tmp_path / "x", {key: value}, [])
    assert inspect_file(tmp_path / "x").metadata.keys == (key,)
    assert not diff_files(tmp_path / "x", GOLDEN).identical


def test_a_tensor_of_an_unknown_format_cannot_be_decoded(tmp_path: Path) -> None:
    write_hfq(tmp_path / "x", {}, [(TensorMeta("t", 99, (2,), 0, 4), bytes(4))])
    with pytest.raises(HfqError, match="unknown quant_type 99") as e:
        inspect_file(tmp_path / "x", None, "t")
    assert e.value.kind is HfqKind.UNKNOWN_FORMAT


@pytest.mark.parametrize(
    ("arguments", "error"),
    [(("[", None), RecipeError), ((None, "model.none"), HfqError)],
)
def test_inspect_refuses_what_makes_no_sense(arguments: tuple[Any, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        inspect_file(GOLDEN, *arguments)


def test_provenance_names_everything_and_no_path(run: Run, tmp_path: Path, small: Path) -> None:
    run("a", alpha=None)
    record = provenance(tmp_path / "a").document
    assert record["program"]["version"]
    assert record["source"]["origin"] == {"folder": "small"}
    assert set(record["source"]["files"]) == {
        "config.json",
        "tokenizer.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert record["imatrix"]["datasets"] == ["random"]
    assert all(layer["alpha"] in (0.0, 0.15, 0.3, 0.5) for layer in record["layers"])
    assert str(small.parent) not in str(record)


def test_a_header_that_differs_is_told(run: Run, tmp_path: Path) -> None:
    run("a")
    data = bytearray((tmp_path / "a").read_bytes())
    data[8] ^= 0xFF
    (tmp_path / "b").write_bytes(data)
    result = diff_files(tmp_path / "a", tmp_path / "b")
    assert not result.identical
    assert [(row.key, row.a, row.b) for row in result.metadata] == [("arch_id of the header", 10, 10 ^ 0xFF)]


def test_inspect_does_not_decode_a_damaged_tensor(run: Run, tmp_path: Path) -> None:
    run("a")
    copy = altered(tmp_path / "a", W1, tmp_path)
    with pytest.raises(HfqError, match=f"{W1}: its bytes are not those that were written"):
        inspect_file(copy, None, W1)
    assert inspect_file(copy, None, "model.norm.weight").tensor is not None


def test_diff_says_which_file_is_damaged(run: Run, tmp_path: Path) -> None:
    run("a")
    copy = altered(tmp_path / "a", W1, tmp_path)
    assert diff_files(tmp_path / "a", copy).damaged == ((str(copy), W1),)
    assert diff_files(copy, tmp_path / "a").damaged == ((str(copy), W1),)
    run("b", tier="mq3")
    assert diff_files(tmp_path / "a", tmp_path / "b").damaged == ()
