"""The tiny source: the released layout, the same bits everywhere, and statistics worth calibrating with."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mq_quant.formats.checkpoint.local import Checkpoint, open_checkpoint
from mq_quant.formats.minimax import expert_name, inventory, layer_prefix, scale_inv_name
from mq_quant.formats.statistics.imatrix import check_imatrix, expert_entry, read_imatrix
from mq_quant.quantize.tiny import checkpoint as tiny
from mq_quant.quantize.tiny import folder as folder_of_tiny
from mq_quant.quantize.tiny.checkpoint import write_tiny
from mq_quant.quantize.tiny.folder import TinySpec, ensure_tiny
from mq_quant.quantize.tiny.tokenizer import byte_symbols, tokenizer_json
from mq_quant.verify.model.reference import layer_by_layer, logits
from safetensors import safe_open
from tokenizers import Tokenizer

SMALL = TinySpec(
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=9,
    vocab_size=300,
    calib_shape=(1, 64),
    eval_shape=(1, 32),
)
SMALL_DIGEST = "b93b94bb858bfa80"
"""Over every stored weight and every importance of SMALL: no machine or library version may change it."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("small")
    write_tiny(folder, SMALL)
    return open_checkpoint(folder)


def digest(folder: Path) -> str:
    """A hash of tensors and importances that leaves container details (header order, library versions) aside."""
    h = hashlib.sha256()
    checkpoint = open_checkpoint(folder)
    for name, info in sorted(checkpoint.tensors.items()):
        with safe_open(folder / info.shard, "pt") as shard:
            tensor = shard.get_tensor(name)
        h.update(f"{name} {info.dtype} {info.shape}".encode())
        h.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    imatrix = read_imatrix(folder / "imatrix.gguf")
    for name in sorted(imatrix.entries):
        entry = imatrix.entries[name]
        h.update(name.encode() + entry.sum2_mean.tobytes() + entry.counts.tobytes())
    h.update(np.load(folder / "eval_tokens.npy").tobytes())
    return h.hexdigest()[:16]


def test_is_the_same_bits_as_on_the_machine_that_made_it_first(small: Checkpoint) -> None:
    assert digest(small.path) == SMALL_DIGEST


def test_does_not_depend_on_threads(small: Checkpoint, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        write_tiny(tmp_path, SMALL)
    finally:
        torch.set_num_threads(before)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in small.path.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (small.path / name).read_bytes(), name


def test_has_the_released_layout(small: Checkpoint) -> None:
    small.validate()
    stored = {"fp8": "F8_E4M3", "bf16": "BF16", "f32": "F32"}
    for spec in inventory(small.config):
        assert small.tensors[spec.name].dtype == stored[spec.stored]
        if spec.stored == "fp8":
            assert small.tensors[scale_inv_name(spec.name)].dtype == "F32"
        weight = small.weight(spec.name)
        assert weight.shape == spec.shape and np.isfinite(weight).all() and weight.any()
    assert len(small.shards) == 2
    assert (small.config.head_dim, small.config.rotary_dim) == (128, 64)


def test_default_dimensions_are_faithful_and_bounded() -> None:
    spec = TinySpec()
    assert spec.hidden_size >= 512 and spec.hidden_size % 256 == 0
    assert spec.intermediate_size >= 512 and spec.num_experts_per_tok == 8
    assert spec.num_local_experts > 8
    weights = 3 * spec.num_hidden_layers * spec.num_local_experts * spec.hidden_size * spec.intermediate_size
    assert weights <= 26e6


def test_weights_are_heavy_tailed_and_channels_unequal(small: Checkpoint) -> None:
    w = small.weight(expert_name(0, 0, "w1")).astype(np.float64)
    columns = np.sqrt((w**2).mean(axis=0))
    z = w / columns
    assert (z**4).mean() > 4.5, "a normal distribution has 3"
    assert columns.max() / columns.min() > 4
    norm = small.weight(f"{layer_prefix(0)}post_attention_layernorm.weight")
    assert norm.max() / np.median(norm) > 4


def test_imatrix_belongs_to_the_model_and_varies(small: Checkpoint) -> None:
    imatrix = read_imatrix(small.path / "imatrix.gguf")
    check_imatrix(imatrix, small.config)
    counts = 0.0
    for projection in ("w1", "w2", "w3"):
        entry = expert_entry(imatrix, 0, projection, small.config.num_local_experts)
        assert entry is not None and np.isfinite(entry.sum2_mean).all()
        assert np.log(np.sqrt(entry.sum2_mean[entry.counts > 0] + 1e-30)).std() > 0.4
        counts = entry.counts.sum()
    assert counts == math.prod(SMALL.calib_shape) * SMALL.num_experts_per_tok
    gate, up = (expert_entry(imatrix, 0, p, 9) for p in ("w1", "w3"))
    assert gate is not None and up is not None
    np.testing.assert_array_equal(gate.sum2_mean, up.sum2_mean)


def test_logits_are_neither_flat_nor_certain(small: Checkpoint) -> None:
    tokens = np.load(small.path / "eval_tokens.npy")
    assert tokens.shape == SMALL.eval_shape and tokens.min() >= 0 and tokens.max() < SMALL.vocab_size - 3
    *_, (_, hidden) = layer_by_layer(small, small.config, tokens)
    assert 0.3 < hidden.std() < 5
    (values,) = logits(small, small.config, hidden)
    p = values.double().softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean().item()
    assert 0.3 * math.log(SMALL.vocab_size) < entropy < 0.95 * math.log(SMALL.vocab_size)


def test_tokenizer_reads_any_bytes_and_its_own_words(small: Checkpoint) -> None:
    tokenizer = Tokenizer.from_file(str(small.path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == SMALL.vocab_size
    vocab = tokenizer_json(640)["model"]["vocab"]
    assert set(byte_symbols()) <= set(vocab) and len(set(byte_symbols())) == 256
    for text in ("hello bada \n\t\x00", "Größe 文字 🙂", " bab cac"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    config = json.loads((small.path / "config.json").read_text())
    assert tokenizer.id_to_token(config["eos_token_id"]) == "<|end|>"
    assert tokenizer.encode("a<|user|>").tokens[-1] == "<|user|>"


def test_is_made_once_and_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(folder_of_tiny, "TinySpec", lambda: SMALL)
    folder = ensure_tiny()
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert folder.parent == tmp_path / "mq-quant"
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert ensure_tiny() == folder and (folder / "config.json").stat().st_mtime_ns == stamp


def test_an_interrupted_making_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def interrupted(folder: Path, spec: TinySpec) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "write_tiny", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_tiny()
    assert list((tmp_path / "mq-quant").iterdir()) == []
