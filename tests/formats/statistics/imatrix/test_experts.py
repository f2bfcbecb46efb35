"""A model's experts in imatrices of several writers: fused entries, converted files, and what is told of a gap."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from mq_quant.formats.errors import ImatrixError
from mq_quant.formats.minimax import parse_config
from mq_quant.formats.statistics.imatrix import (
    GGUF_NAMES,
    ImatrixEntry,
    check_imatrix,
    coverage,
    expert_entry,
    read_imatrix,
    write_imatrix,
)
from small_model import CONFIG

MODEL = parse_config(CONFIG)
EXPERTS, WIDTH = MODEL.num_local_experts, MODEL.hidden_size
Content = dict[str, ImatrixEntry]


def name(layer: int, tensor: str) -> str:
    return f"blk.{layer}.{tensor}.weight"


def content(fused: str | None = None) -> Content:
    """Statistics of the small model, gate and up equal; with `fused` under that one name for the two."""
    out: Content = {}
    for layer in range(MODEL.num_hidden_layers):
        random = np.random.default_rng(layer)
        gate_up, down = random.lognormal(size=(2, EXPERTS, WIDTH)).astype(np.float32)
        counts = random.integers(1, 99, EXPERTS).astype(np.float64)
        tensors = ["ffn_gate_exps", "ffn_up_exps"] if fused is None else [fused]
        out |= {name(layer, tensor): ImatrixEntry(gate_up, counts) for tensor in tensors}
        out[name(layer, "ffn_down_exps")] = ImatrixEntry(down, counts)
    return out


def saved(path: Path, entries: Content) -> Path:
    write_imatrix(path, entries, ["text"], 1, 512)
    return path


@pytest.mark.parametrize("fused", ["ffn_gate_up_exps", "ffn_up_gate_exps"])
def test_one_entry_of_gate_and_up_serves_both(fused: str, tmp_path: Path) -> None:
    split = read_imatrix(saved(tmp_path / "split", content()))
    together = read_imatrix(saved(tmp_path / "fused", content(fused)))
    check_imatrix(together, MODEL)
    assert coverage(together, MODEL) == coverage(split, MODEL) == 1
    for layer in range(MODEL.num_hidden_layers):
        for projection in GGUF_NAMES:
            mine = expert_entry(together, layer, projection, EXPERTS)
            other = expert_entry(split, layer, projection, EXPERTS)
            assert mine is not None and other is not None
            assert np.array_equal(mine.sum2_mean, other.sum2_mean)
            assert np.array_equal(mine.counts, other.counts)


def test_an_entry_of_its_own_comes_first_unless_nothing_was_counted_for_it(tmp_path: Path) -> None:
    entries = content() | {n: e for n, e in content("ffn_gate_up_exps").items() if "gate_up" in n}
    own = ImatrixEntry(np.full((EXPERTS, WIDTH), 2.0, np.float32), np.ones(EXPERTS))
    entries[name(0, "ffn_up_exps")] = own
    entries[name(1, "ffn_up_exps")] = ImatrixEntry(own.sum2_mean, np.zeros(EXPERTS))
    imatrix = read_imatrix(saved(tmp_path / "x", entries))
    first, second = (expert_entry(imatrix, layer, "w3", EXPERTS) for layer in (0, 1))
    assert first is not None and (first.sum2_mean == 2).all()
    assert second is not None and np.allclose(
        second.sum2_mean, entries[name(1, "ffn_gate_up_exps")].sum2_mean, rtol=1e-6
    )


def test_a_fused_entry_does_not_serve_down(tmp_path: Path) -> None:
    entries = {n: e for n, e in content("ffn_gate_up_exps").items() if "down" not in n}
    with pytest.raises(ImatrixError, match=r"blk\.0\.ffn_down_exps\.weight is missing"):
        check_imatrix(read_imatrix(saved(tmp_path / "x", entries)), MODEL)


def test_a_file_converted_from_dat_keeps_all_experts_in_one_row(tmp_path: Path) -> None:
    """llama.cpp writes an old file anew with one count for an entry, since it does not know those of the experts."""
    one_row = {n: ImatrixEntry(e.sum2_mean.reshape(1, -1), np.array([64.0])) for n, e in content().items()}
    one_row[name(0, "ffn_up_exps")].sum2_mean[0, WIDTH : 2 * WIDTH] = 1
    imatrix = read_imatrix(saved(tmp_path / "x", one_row))
    check_imatrix(imatrix, MODEL)
    entry = expert_entry(imatrix, 0, "w3", EXPERTS)
    assert entry is not None and entry.counts.tolist() == [64, 0, 64]
    whole = content()[name(0, "ffn_up_exps")].sum2_mean
    assert np.allclose(entry.sum2_mean[[0, 2]], whole[[0, 2]], rtol=1e-6)


EMPTY = ImatrixEntry(np.zeros((EXPERTS, WIDTH), np.float32), np.zeros(EXPERTS))
WIDE = ImatrixEntry(np.ones((EXPERTS, 2 * WIDTH), np.float32), np.ones(EXPERTS))


@pytest.mark.parametrize(
    ("entry", "hint"),
    [(EMPTY, "too little text"), (None, "incomplete, or of another model"), (WIDE, "of another model")],
)
def test_what_is_wrong_with_one_entry_is_told_as_it_is(
    entry: ImatrixEntry | None, hint: str, tmp_path: Path
) -> None:
    where = name(1, "ffn_down_exps")
    entries = {n: e for n, e in (content() | {where: entry}).items() if e is not None}
    with pytest.raises(ImatrixError, match=hint) as caught:
        check_imatrix(read_imatrix(saved(tmp_path / "x", entries)), MODEL)
    assert where in str(caught.value)
    assert ("another model" in str(caught.value)) == (entry is not EMPTY)


@pytest.mark.parametrize(
    "spelled",
    [
        "CUDA0#{}.weight#0",
        "{}.weight (reshaped)",
        "{}.weight (view) (cont)",
        "ROCm1#{}.weight (cont)#12",
        "{}",
    ],
)
def test_names_of_copies_and_views_are_those_of_the_weight(spelled: str, tmp_path: Path) -> None:
    entries = {spelled.format(n.removesuffix(".weight")): e for n, e in content().items()}
    imatrix = read_imatrix(saved(tmp_path / "x", entries))
    check_imatrix(imatrix, MODEL)
    assert set(imatrix.entries) == set(content())


def test_two_spellings_of_one_weight_are_refused(tmp_path: Path) -> None:
    where = name(0, "ffn_up_exps")
    entries = content() | {f"CUDA0#{where}#0": content()[where]}
    with pytest.raises(ImatrixError, match="appears twice"):
        read_imatrix(saved(tmp_path / "x", entries))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 419904\n"


def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "imatrix.gguf").write_bytes(POINTER)
    with pytest.raises(ImatrixError, match=r"imatrix\.gguf: is a pointer file of Git LFS"):
        read_imatrix(tmp_path / "imatrix.gguf")


@pytest.mark.parametrize("kind", ["gguf", "dat"])
@pytest.mark.parametrize("left", [0, 40, -4])
def test_a_file_that_shrinks_or_changes_is_an_error_that_names_it(
    kind: str, left: int, tmp_path: Path
) -> None:
    path = tmp_path / "imatrix"
    if kind == "gguf":
        saved(path, content())
    else:
        values = np.ones(EXPERTS * WIDTH, "<f4").tobytes()
        head = struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, EXPERTS * WIDTH)
        path.write_bytes(head + values)
    imatrix = read_imatrix(path)
    first = next(iter(imatrix.entries))
    assert imatrix.entries[first].sum2_mean.size
    data = path.read_bytes()
    path.write_bytes(data[:left] if left >= 0 else data[:left] + b"\1\2\3\4")
    with pytest.raises(ImatrixError, match="imatrix: changed after"):
        imatrix.entries[first]


def test_a_file_that_was_only_copied_over_itself_is_the_same_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "x", content())
    imatrix = read_imatrix(path)
    path.write_bytes(path.read_bytes())
    assert len([imatrix.entries[n] for n in imatrix.entries]) == len(content())
