"""Calibration: what is gathered is E[x xᵀ] of the real activations, whatever interrupts it; bad input is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_model
import torch
from mq_quant.awq.from_moments import load_calibration
from mq_quant.formats.checkpoint.local import Checkpoint, open_checkpoint
from mq_quant.formats.errors import (
    BackendError,
    CalibrationError,
    CheckpointError,
    MqError,
    OutputError,
    ResumeError,
    TokenError,
)
from mq_quant.formats.minimax import expert_name
from mq_quant.formats.statistics.imatrix import check_imatrix, expert_entry, read_imatrix
from mq_quant.formats.statistics.moment_file import (
    DOWN_FORMS,
    DownForm,
    LayerFile,
    layer_file,
    layer_tensors,
    open_layer_file,
)
from mq_quant.formats.statistics.moment_folder import IMATRIX, MANIFEST
from mq_quant.formats.statistics.triangles import pack_moment, unpack_correlation, unpack_moment
from mq_quant.quantize.calibrate.folder import JOURNAL, hidden_file
from mq_quant.quantize.calibrate.layer_pass import open_device
from mq_quant.quantize.calibrate.moments import LayerMoments
from mq_quant.quantize.calibrate.run import CalibrationOptions, calibrate
from mq_quant.quantize.calibrate.sums import packed, second_moment, squares
from mq_quant.quantize.calibrate.tokens import check_tokens, read_tokens, tokenize
from mq_quant.quantize.spec.calibration_sizes import calibration_sizes
from mq_quant.verify.model.reference import Observer, Routing, layer_by_layer, layer_forward

TOKENS = np.random.default_rng(0).integers(0, 300, (3, 20)).astype(np.int32)


def options(**given: Any) -> CalibrationOptions:
    return CalibrationOptions(**given)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(small_model.save(tmp_path_factory.mktemp("m") / "small", small_model.tensors()))


def opened(folder: Path, source: Checkpoint, layer: int, down: DownForm = "full") -> LayerFile:
    path = folder / layer_file(layer)
    return open_layer_file(path, source.config, down)


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


class Rows(Observer):
    """Keeps all inputs, as a second opinion on what was gathered."""

    def __init__(self) -> None:
        self.shared: dict[int, np.ndarray] = {}
        self.down: dict[tuple[int, int], np.ndarray] = {}
        self.gate: dict[tuple[int, int], np.ndarray] = {}
        self.attn: dict[tuple[int, str], np.ndarray] = {}

    def dense(self, layer: int, projection: str, inputs: torch.Tensor) -> None:
        self.attn[layer, projection] = inputs.double().numpy()

    def routed(self, layer: int, inputs: torch.Tensor, routing: Routing) -> None:
        self.shared[layer] = inputs.double().numpy()

    def expert(
        self, layer: int, expert: int, tokens: torch.Tensor, inputs: torch.Tensor, product: torch.Tensor
    ) -> None:
        self.gate[layer, expert], self.down[layer, expert] = inputs.double().numpy(), product.double().numpy()


@pytest.fixture(scope="module")
def rows(source: Checkpoint) -> Rows:
    seen = Rows()
    for _ in layer_by_layer(source, source.config, TOKENS, seen):
        pass
    return seen


@pytest.fixture(scope="module")
def full(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "calib"
    calibrate(source, TOKENS, folder, options(down="full"))
    return folder


def test_moments_are_the_means_over_the_rows_that_each_matrix_saw(
    full: Path, source: Checkpoint, rows: Rows
) -> None:
    for layer in range(2):
        file = opened(full, source, layer)
        x = rows.shared[layer]
        got = unpack_moment(file.array("gate_up.moment"), 256)
        np.testing.assert_allclose(got, x.T @ x / len(x), rtol=1e-6, atol=1e-9)
        assert file.array("gate_up.tokens") == [TOKENS.size]
        pooled, total = np.zeros((256, 256)), 0
        for e in range(3):
            x = rows.down.get((layer, e), np.zeros((0, 256)))
            assert file.array("down.counts")[e] == file.array("gate_up.counts")[e] == len(x)
            pooled, total = pooled + x.T @ x, total + len(x)
            expected = x.T @ x / max(len(x), 1)
            np.testing.assert_allclose(unpack_moment(file.row("down.moment", e), 256), expected, rtol=1e-6)
            np.testing.assert_allclose(file.row("down.diagonal", e), np.diag(expected), rtol=1e-6)
            gate = rows.gate.get((layer, e), np.zeros((1, 256)))
            np.testing.assert_allclose(file.row("gate_up.diagonal", e), np.square(gate).mean(0), rtol=1e-6)
        assert total == 2 * TOKENS.size
        np.testing.assert_allclose(
            unpack_moment(file.array("down.pooled"), 256), pooled / total, rtol=1e-6, atol=1e-30
        )


def test_the_imatrix_holds_what_llama_cpp_would_have_counted(
    full: Path, source: Checkpoint, rows: Rows
) -> None:
    imatrix = read_imatrix(full / IMATRIX)
    check_imatrix(imatrix, source.config)
    assert imatrix.kind == "gguf" and imatrix.chunk_count == 3
    for projection, seen in (("w1", rows.gate), ("w3", rows.gate), ("w2", rows.down)):
        entry = expert_entry(imatrix, 1, projection, 3)
        assert entry is not None
        for e in range(3):
            assert entry.counts[e] == len(seen[1, e])
            np.testing.assert_allclose(entry.sum2_mean[e], np.square(seen[1, e]).mean(0), rtol=1e-5)
    for name, projection in (("attn_q", "q_proj"), ("attn_v", "v_proj"), ("attn_output", "o_proj")):
        dense = imatrix.entries[f"blk.0.{name}.weight"]
        np.testing.assert_allclose(dense.sum2_mean[0], np.square(rows.attn[0, projection]).mean(0), rtol=1e-5)


@pytest.mark.parametrize("down", DOWN_FORMS)
def test_each_form_of_the_down_moments_keeps_what_it_says(
    down: DownForm, full: Path, source: Checkpoint, tmp_path: Path
) -> None:
    result = calibrate(source, TOKENS, tmp_path / "calib", options(down=down))
    sizes = calibration_sizes(source.config, TOKENS.size, down)
    written = (tmp_path / "calib" / layer_file(0)).stat().st_size
    assert sizes.layer_bytes < written < sizes.layer_bytes + 4096
    assert sizes.folder_bytes < result.folder_bytes < 1.5 * sizes.folder_bytes
    file, exact = opened(tmp_path / "calib", source, 0, down), opened(full, source, 0)
    assert ("down.moment" in file.infos) == (down != "pooled")
    np.testing.assert_array_equal(file.array("down.pooled"), exact.array("down.pooled"))
    if down == "compact":
        for e in range(3):
            diagonal = file.row("down.diagonal", e)
            got = unpack_correlation(file.row("down.moment", e), diagonal)
            root = np.sqrt(np.outer(diagonal, diagonal).astype(np.float64))
            error = np.abs(got - unpack_moment(exact.row("down.moment", e), 256)) / root
            assert error.max() < 2**-11
            np.testing.assert_array_equal(np.diag(got), diagonal)


class StopError(Exception):
    """An interruption."""


class Failing:
    """A source that stops when one tensor is asked for."""

    def __init__(self, source: Checkpoint, at: str) -> None:
        self._source, self._at = source, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def weight(self, name: str) -> np.ndarray:
        if name == self._at:
            raise StopError
        return self._source.weight(name)

    def rows(self, name: str, low: int, high: int) -> np.ndarray:
        if name == self._at:
            raise StopError
        return self._source.rows(name, low, high)


@pytest.mark.parametrize(
    "at",
    [
        "model.embed_tokens.weight",
        expert_name(0, 1, "w2"),
        "model.layers.1.input_layernorm.weight",
        expert_name(1, 2, "w2"),
    ],
)
def test_an_interrupted_calibration_continues_to_the_same_bytes(
    at: str, full: Path, source: Checkpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "calib"
    with pytest.raises(StopError):
        calibrate(Failing(source, at), TOKENS, folder, options(down="full"))
    assert not (folder / MANIFEST).exists()
    with pytest.raises(CalibrationError, match="not finished"):
        load_calibration(folder, source.config)
    after = calibrate(source, TOKENS, folder, options(down="full"))
    assert after.resumed_layers == int(".layers.1." in at)
    assert contents(folder) == contents(full)


def test_a_stop_between_the_last_layer_and_the_manifest_costs_nothing(
    full: Path, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise StopError

    folder = tmp_path / "calib"
    with monkeypatch.context() as patch:
        patch.setattr("mq_quant.quantize.calibrate.folder.write_imatrix", stop)
        with pytest.raises(StopError):
            calibrate(source, TOKENS, folder, options(down="full"))
    reading_nothing = Failing(source, "none")
    for read in ("weight", "rows"):
        monkeypatch.setattr(reading_nothing, read, stop)
    assert calibrate(reading_nothing, TOKENS, folder, options(down="full")).resumed_layers == 2
    assert contents(folder) == contents(full)


@pytest.mark.parametrize("file", [layer_file(0), hidden_file(1)])
@pytest.mark.parametrize("harm", ["flip", "remove"])
def test_resuming_refuses_what_was_changed_meanwhile(
    file: str, harm: str, full: Path, source: Checkpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "calib"
    with pytest.raises(StopError):
        calibrate(Failing(source, expert_name(1, 0, "w1")), TOKENS, folder, options(down="full"))
    data = bytearray((folder / file).read_bytes())
    data[-1] ^= 1
    (folder / file).write_bytes(data) if harm == "flip" else (folder / file).unlink()
    with pytest.raises(ResumeError, match=f"(?s){file}.*--restart"):
        calibrate(source, TOKENS, folder, options(down="full"))
    calibrate(source, TOKENS, folder, options(down="full", restart=True))
    assert contents(folder) == contents(full)


def test_other_arguments_do_not_continue_an_unfinished_calibration(
    source: Checkpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "calib"
    with pytest.raises(StopError):
        calibrate(Failing(source, expert_name(1, 0, "w1")), TOKENS, folder, options())
    with pytest.raises(ResumeError, match=r"tokens\.sha256"):
        calibrate(source, TOKENS[::-1], folder, options())
    with pytest.raises(ResumeError, match="down is 'compact' there and 'pooled' here"):
        calibrate(source, TOKENS, folder, options(down="pooled"))
    assert (folder / JOURNAL).exists()


def test_what_is_there_already_is_not_overwritten(full: Path, source: Checkpoint, tmp_path: Path) -> None:
    before = contents(full)
    with pytest.raises(OutputError, match="finished calibration"):
        calibrate(source, TOKENS, full, options(down="full"))
    assert contents(full) == before
    (tmp_path / "photo.jpg").write_bytes(b"precious")
    for force in (False, True):
        with pytest.raises(OutputError, match=r"photo\.jpg"):
            calibrate(source, TOKENS, tmp_path, options(force=force, restart=True))
    assert (tmp_path / "photo.jpg").read_bytes() == b"precious"
    with pytest.raises(OutputError, match="mkdir -p"):
        calibrate(source, TOKENS, tmp_path / "no" / "where", options())
    for place, name in (("a", ".git"), ("b", layer_file(0))):
        (tmp_path / place).mkdir()
        (tmp_path / place / name).write_bytes(b"precious")
        with pytest.raises(OutputError, match=name):
            calibrate(source, TOKENS, tmp_path / place, options(force=True))
        assert (tmp_path / place / name).read_bytes() == b"precious"
    calibrate(source, TOKENS[:1], tmp_path / "calib", options())
    calibrate(source, TOKENS, tmp_path / "calib", options(down="full", force=True))
    assert contents(tmp_path / "calib") == before


def test_a_full_disk_is_an_error_and_the_calibration_continues_after_it(
    full: Path, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    folder, sync, left = tmp_path / "calib", os.fsync, [4]

    def fsync(fd: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OutputError, match="the disk is full"):
            calibrate(source, TOKENS, folder, options(down="full"))
    assert calibrate(source, TOKENS, folder, options(down="full")).resumed_layers == 1
    assert contents(folder) == contents(full)


def test_a_disk_that_is_too_small_is_refused_before_any_work(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(OutputError, match=r"has 0\.0 GB free.*\n.*--down pooled"):
        calibrate(Failing(source, "model.embed_tokens.weight"), TOKENS, tmp_path / "calib", options())


def test_rows_that_are_not_finite_are_left_out_and_reported(source: Checkpoint) -> None:
    moments = LayerMoments(source.config, 1, "full")
    x = torch.randn(10, 256, generator=torch.Generator().manual_seed(1))
    product = torch.randn(10, 256, generator=torch.Generator().manual_seed(2))
    x[3, 7], product[4, 0], product[5, 1], product[6, 2] = torch.nan, torch.inf, -torch.inf, 1e30
    routing = Routing(torch.zeros(10, 1, dtype=torch.int64), torch.ones(10, 1))
    moments.routed(1, x, routing)
    moments.expert(1, 0, torch.arange(10), x, product)
    arrays = moments.finish()
    good = [0, 1, 2, 3, 7, 8, 9]
    kept = product[good].double().numpy()
    assert arrays["gate_up.tokens"] == [9] and arrays["gate_up.counts"][0] == 9
    assert arrays["down.counts"].tolist() == [7, 0, 0] and moments.unseen == [1, 2]
    assert all(np.isfinite(a).all() for a in arrays.values())
    np.testing.assert_allclose(unpack_moment(arrays["down.moment"][0], 256), kept.T @ kept / 7, rtol=1e-6)
    assert moments.notes == [
        "layer 1: the input of the experts: 1 of 10 rows are not finite and were left out",
        "layer 1: expert 0, the input of down: 3 of 10 rows are not finite and were left out",
    ]


def test_a_layer_without_any_finite_activation_is_an_error(source: Checkpoint) -> None:
    moments = LayerMoments(source.config, 1, "compact")
    broken = torch.full((4, 256), torch.nan)
    routing = Routing(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
    with pytest.raises(CalibrationError, match="layer 1: no token"):
        moments.routed(1, broken, routing)
    moments.expert(1, 2, torch.arange(4), torch.ones(4, 256), broken)
    with pytest.raises(CalibrationError, match="layer 1: no expert"):
        moments.finish()


def test_an_expert_that_overflows_is_reported_and_left_out(tmp_path: Path, rows: Rows) -> None:
    content = small_model.tensors()
    for projection in ("w1", "w3"):
        content[expert_name(1, 1, projection) + "_scale_inv"] *= 1e25
    broken = open_checkpoint(small_model.save(tmp_path / "m", content))
    result = calibrate(broken, TOKENS, tmp_path / "calib", options(down="full"))
    seen = len(rows.down[1, 1])
    assert result.notes == (
        f"layer 1: expert 1, the input of down: {seen} of {seen} rows are not finite and were left out",
    )
    file = opened(tmp_path / "calib", broken, 1)
    assert file.array("down.counts").tolist() == [len(rows.down[1, 0]), 0, len(rows.down[1, 2])]
    assert file.array("gate_up.counts")[1] == seen
    assert all(np.isfinite(file.array(name)).all() for name in file.infos)
    loaded = load_calibration(tmp_path / "calib", broken.config)
    fallbacks = [note for n in range(broken.config.num_hidden_layers) for note in loaded.layer(n).notes]
    assert fallbacks[0] == result.notes[0] and "w2: experts 1 (1)" in fallbacks[1]


def test_quantised_propagation_feeds_each_layer_what_the_built_file_puts_out(
    source: Checkpoint, tmp_path: Path
) -> None:
    from mq_quant.formats.hfq import open_hfq
    from mq_quant.quantize.pipeline.build import RunOptions, build_file
    from mq_quant.quantize.pipeline.build_spec import RecipeChanges
    from mq_quant.quantize.pipeline.statistics import MomentFolder
    from mq_quant.quantize.spec.places import choose_recipe
    from mq_quant.verify.model.hfq_weights import DecodedFile

    recipe = RecipeChanges(alpha=0.4).apply(choose_recipe("mq2", None, str(source.path)))
    given = options(down="full", propagate=recipe, jobs=2)
    folder, whole, out = tmp_path / "calib", tmp_path / "whole", tmp_path / "out.mq2"
    with pytest.raises(StopError):
        calibrate(Failing(source, expert_name(1, 2, "w2")), TOKENS, folder, given)
    assert calibrate(source, TOKENS, folder, given).resumed_layers == 1
    calibrate(source, TOKENS, whole, options(down="full", propagate=recipe, jobs=1))
    assert contents(folder) == contents(whole)
    build_file(recipe, MomentFolder(folder), RunOptions(out))
    seen = Rows()
    with open_hfq(out) as file:
        _, hidden = next(layer_by_layer(DecodedFile(file), source.config, TOKENS))
    layer_forward(source, source.config, 1, hidden, seen)
    x = seen.shared[1]
    got = unpack_moment(opened(folder, source, 1).array("gate_up.moment"), 256)
    np.testing.assert_allclose(got, x.T @ x / len(x), rtol=1e-6, atol=1e-9)
    for e in range(3):
        x = seen.down[1, e]
        got = unpack_moment(opened(folder, source, 1).row("down.moment", e), 256)
        np.testing.assert_allclose(got, x.T @ x / len(x), rtol=1e-6, atol=1e-6 * np.square(x).mean())


def test_experts_without_a_token_are_named(tmp_path: Path) -> None:
    content = small_model.tensors()
    content["model.layers.0.block_sparse_moe.e_score_correction_bias"] = torch.tensor([9.0, -9.0, 9.0])
    lonely = open_checkpoint(small_model.save(tmp_path / "m", content))
    result = calibrate(lonely, TOKENS, tmp_path / "calib", options())
    layers = json.loads((tmp_path / "calib" / MANIFEST).read_bytes())["layers"]
    assert layers[0]["unseen"] == [1] and layers[1]["unseen"] == []
    assert result.coverage == pytest.approx(5 / 6)


def test_sums_over_many_chunks_are_exact_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mq_quant.quantize.calibrate.sums.CHUNK", 3)
    x = torch.randint(-8, 9, (10, 5), generator=torch.Generator().manual_seed(0)).float()
    total = second_moment(x)
    assert (total == x.double().T @ x.double()).all()
    np.testing.assert_array_equal(packed(total / 7).numpy(), pack_moment((total / 7).numpy()))
    assert torch.equal(squares(x), x.double().square().sum(0))
    assert (squares(x[:0]) == 0).all()
    good = (torch.arange(10) % 3 != 1)[:, None]
    broken = torch.where(good, x, torch.nan)
    assert torch.equal(squares(broken, good), x[good[:, 0]].double().square().sum(0))


def save_tokens(path: Path, value: Any) -> Path:
    np.save(path, value, allow_pickle=True)
    return path


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (np.zeros((2, 3), np.float32), "float32"),
        (np.zeros(8, np.int32), "whole numbers"),
        (np.zeros((0, 8), np.int64), "whole numbers"),
        (np.zeros((2, 3), bool), "whole numbers"),
        (np.array([[0, 300]]), "token 300, outside the vocabulary of 300"),
        (np.array([[0, -1]]), "token -1"),
        (np.array([[0, 2**40]]), "token 1099511627776"),
        (np.array([[{"a": 1}]], dtype=object), "cannot be read"),
        (np.zeros((1, 200_000), np.uint8), "196608 positions"),
    ],
)
def test_tokens_that_cannot_be_used_are_refused(
    value: Any, problem: str, source: Checkpoint, tmp_path: Path
) -> None:
    path = save_tokens(tmp_path / "tokens.npy", value)
    with pytest.raises(TokenError, match=problem):
        read_tokens(path, source.config)


def test_token_files_that_are_none_are_refused(source: Checkpoint, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=TOKENS)
    for name, data in (("empty.npy", b""), ("text.npy", b"hello"), ("cut.npy", b"\x93NUMPY\x01\x00")):
        (tmp_path / name).write_bytes(data)
    for name in ("a.npz", "empty.npy", "text.npy", "cut.npy", "missing.npy"):
        with pytest.raises(TokenError, match=name):
            read_tokens(tmp_path / name, source.config)


def test_the_first_sequences_are_taken_and_missing_ones_named(source: Checkpoint, tmp_path: Path) -> None:
    path = save_tokens(tmp_path / "tokens.npy", TOKENS)
    assert (read_tokens(path, source.config, 2) == TOKENS[:2]).all()
    with pytest.raises(TokenError, match="3 sequences, fewer than the 4"):
        read_tokens(path, source.config, 4)


@pytest.fixture
def with_tokenizer(source: Checkpoint, tmp_path: Path) -> Checkpoint:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder = small_model.save(tmp_path / "worded", small_model.tensors())
    tokenizer = Tokenizer(
        WordLevel({"zero": 0, "one": 1, "two": 2, "far": 299, "out": 300}, unk_token="zero")
    )
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return open_checkpoint(folder)


def test_a_text_is_cut_into_sequences(with_tokenizer: Checkpoint, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two far two one " * 3)
    got = tokenize(text, with_tokenizer, length=4)
    assert got.tolist() == [[1, 2, 299, 2], [1, 1, 2, 299], [2, 1, 1, 2]] and got.dtype == np.int32
    assert tokenize(text, with_tokenizer, 4, 2).tolist() == got[:2].tolist()
    with pytest.raises(TokenError, match="15 tokens, shorter than 4 sequences of 4"):
        tokenize(text, with_tokenizer, 4, 4)
    with pytest.raises(TokenError, match="15 tokens, shorter than 1 sequences of 512"):
        tokenize(text, with_tokenizer)
    with pytest.raises(TokenError, match="--length: has sequences of 200000 tokens, and the model 196608"):
        tokenize(text, with_tokenizer, 200_000)
    with pytest.raises(TokenError, match="are more than"):
        tokenize(text, with_tokenizer, 1000, 10**9)
    text.write_text("one out")
    with pytest.raises(TokenError, match="token 300, outside"):
        tokenize(text, with_tokenizer, 2)
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TokenError, match="UTF-8"):
        tokenize(text, with_tokenizer, 2)
    with pytest.raises(TokenError, match=r"gone\.txt"):
        tokenize(tmp_path / "gone.txt", with_tokenizer, 2)


def test_a_broken_tokenizer_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one")
    folder = small_model.save(tmp_path / "bare", small_model.tensors())
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenError, match=r"tokenizer\.json"):
        tokenize(tmp_path / "text.txt", open_checkpoint(folder), 1)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        tokenize(tmp_path / "text.txt", open_checkpoint(folder), 1)


def test_ids_are_checked_whatever_their_type(source: Checkpoint, tmp_path: Path) -> None:
    for dtype in (np.uint16, np.int64, ">i4"):
        assert check_tokens(TOKENS.astype(dtype), source.config, tmp_path).dtype == np.int32


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(BackendError, match="no GPU"):
        open_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine")
def test_a_gpu_gathers_what_the_cpu_does(full: Path, source: Checkpoint, tmp_path: Path) -> None:
    calibrate(source, TOKENS, tmp_path / "a", options(down="full", device="cuda"))
    with pytest.raises(StopError):
        calibrate(
            Failing(source, expert_name(1, 2, "w2")),
            TOKENS,
            tmp_path / "b",
            options(down="full", device="cuda"),
        )
    calibrate(source, TOKENS, tmp_path / "b", options(down="full", device="cuda"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for layer in range(2):
        here, there = opened(full, source, layer), opened(tmp_path / "a", source, layer)
        for name in here.infos:
            a, b = here.array(name).astype(np.float64), there.array(name).astype(np.float64)
            assert np.abs(a - b).max() <= 1e-4 * np.abs(a).max()


def test_the_estimate_counts_every_tensor_of_the_file(source: Checkpoint) -> None:
    for down in DOWN_FORMS:
        sizes = {name: np.prod(shape) for name, (_, shape) in layer_tensors(source.config, down).items()}
        assert calibration_sizes(source.config, 60, down).layer_bytes > 2 * sum(sizes.values())


def test_the_command_writes_a_folder_that_a_build_takes(
    source: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mq_quant.quantize.cli.app import main

    tokens, folder, out = save_tokens(tmp_path / "t.npy", TOKENS), tmp_path / "calib", tmp_path / "out.mq2"

    def run(*args: object) -> dict[str, Any]:
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in args])
        assert stopped.value.code == 0
        return dict(json.loads(capsys.readouterr().out))

    common = ("calibrate", "--source", source.path, "--tokens", tokens, "-o", folder, "--json")
    assert run(*common, "--dry-run")["tokens"] == TOKENS.size and not folder.exists()
    result = run(*common)
    assert result["coverage"] == 1 and result["layers"] == 2
    build = ("build", "--tier", "mq2", "--source", source.path, "-o", out, "--awq-alpha", 0, "--json")
    assert run(*build, "--calibration", folder)["coverage"] == 1
    seen = run("inspect", out, "--provenance", "--json")
    record = seen.get("provenance", seen)["calibration"]
    assert record["tokens"]["sequences"] == 3 and len(record["sha256"]) == 64
    same = ("reproduce", out, "--source", source.path, "--json")
    assert run(*same, "--calibration", folder)["identical"]


@pytest.mark.parametrize(
    "args",
    [
        ("--tokens", "a.npy", "--text", "b.txt"),
        ("--tokens", "a.npy", "--down", "half"),
        ("--tokens", "a.npy", "--device", "tpu"),
        ("--tokens", "a.npy", "--propagate", "both"),
        ("--tokens", "a.npy", "--propagate", "quantised"),
        ("--tokens", "a.npy", "--tier", "mq2"),
        ("--tokens", "a.npy"),
    ],
)
def test_the_command_refuses_bad_arguments(
    args: tuple[str, ...], source: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mq_quant.quantize.cli.app import main

    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", "--source", str(source.path), "-o", str(tmp_path / "calib"), *args])
    assert stopped.value.code == 2 and not (tmp_path / "calib").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_a_calibration_and_a_plain_build_contradict_each_other(
    source: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mq_quant.quantize.cli.app import main

    both = ["--calibration", str(tmp_path), "--no-imatrix"]
    with pytest.raises(SystemExit) as stopped:
        main(["build", "--tier", "mq2", "--source", str(source.path), "-o", str(tmp_path / "out"), *both])
    assert stopped.value.code == 2
    assert "give one of the two" in " ".join(capsys.readouterr().err.replace("\u2502", "").split())


def test_an_imatrix_stands_behind_thin_moments_and_the_file_says_so(
    full: Path, source: Checkpoint, tmp_path: Path
) -> None:
    """60 tokens are few for 256 channels: every projection of every layer leans on the imatrix."""
    from mq_quant.formats.hfq import open_hfq
    from mq_quant.quantize.inspect.reproduce import Inputs, reproduce
    from mq_quant.quantize.pipeline.build import RunOptions, build_file
    from mq_quant.quantize.pipeline.build_spec import RecipeChanges
    from mq_quant.quantize.pipeline.statistics import MomentFolder
    from mq_quant.quantize.spec.places import choose_recipe
    from small_imatrix import save_imatrix

    save_imatrix(tmp_path / "imatrix.gguf")
    imatrix = tmp_path / "imatrix.gguf"
    recipe, seen = choose_recipe("mq2", None, str(source.path)), {}
    for name, given in (("alone", None), ("backed", imatrix)):
        made = RunOptions(tmp_path / name)
        seen[name] = build_file(recipe, MomentFolder(full, given), made, RecipeChanges(alpha=0.4))
    assert seen["alone"].quantization_hash != seen["backed"].quantization_hash
    assert seen["alone"].fallbacks == ()
    said = list(seen["backed"].fallbacks)
    assert [n for n in said if "w1, w3" in n] == [
        f"layer {n} w1, w3: 60 tokens, fewer than 1024: imatrix behind them" for n in range(2)
    ]
    assert [n.split(" (3)")[0] for n in said if " w2: experts 0, 1, 2 (3) with fewer" in n] == [
        f"layer {n} w2: experts 0, 1, 2" for n in range(2)
    ]
    with open_hfq(tmp_path / "backed") as file:
        made_from = file.metadata["mq_quant"]
    assert made_from["imatrix"]["kind"] == "gguf" and made_from["calibration"]["down"] == "full"
    assert [note for layer in made_from["layers"] for note in layer["fallbacks"]] == said
    where = str(source.path)
    assert reproduce(tmp_path / "backed", Inputs(where, imatrix, full)).identical
    with pytest.raises(MqError, match="without an imatrix"):
        reproduce(tmp_path / "alone", Inputs(where, imatrix, full))
    with pytest.raises(MqError, match="the imatrix is not the one"):
        reproduce(tmp_path / "backed", Inputs(where, calibration=full))
