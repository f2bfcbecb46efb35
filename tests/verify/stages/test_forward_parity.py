"""The forward pass through the kernels: exact where weights are, and its figures, memory and gate honest where not."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from mq_quant.formats.checkpoint.local import Checkpoint
from mq_quant.formats.errors import CheckError
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.minimax import awq_scale_name, expert_name, inventory
from mq_quant.kernels.runtime.host import Backend
from mq_quant.verify.hidden import open_hidden
from mq_quant.verify.model import kernel_forward as kernel_model
from mq_quant.verify.model.kernel_forward import KernelModel
from mq_quant.verify.model.reference import layer_by_layer, logits
from mq_quant.verify.stages import generation as generate
from mq_quant.verify.stages.forward_parity import ForwardFigures, check_forward
from mq_quant.verify.stages.generation import check_generation, coherence
from plainfile import Build, Tensors, by_name


@pytest.fixture(scope="module")
def tokens(checkpoint: Checkpoint) -> np.ndarray:
    ids: np.ndarray = np.load(checkpoint.path / "eval_tokens.npy")[:, :5].astype(np.int64)
    return ids


def test_hidden_states_are_those_of_the_source_where_weights_are_exact(
    build: Build, checkpoint: Checkpoint, backend: Backend, tokens: np.ndarray, tmp_path: Path
) -> None:
    """Everything in F32, with an AWQ scale and its sidecar: what is left is the order of f32 sums."""
    with open_hfq(build("F32", "F32", exact=True)) as file:
        stage = check_forward(file, checkpoint.config, backend, tokens, tmp_path / "dump")
        assert stage.ok, stage.complaints
        assert stage.seen == tokens.size
        assert stage.as_json()["ppl_test"] == pytest.approx(stage.as_json()["ppl_reference"], rel=1e-4)
    dump = open_hidden(tmp_path / "dump")
    assert dump.shape == (checkpoint.config.num_hidden_layers, tokens.size, checkpoint.config.hidden_size)
    *_, (_, last) = layer_by_layer(checkpoint, checkpoint.config, tokens)
    np.testing.assert_allclose(dump.layer(1), last.reshape(tokens.size, -1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("formats", [("MQ2-Lloyd", "MQ4"), ("MQ3-Lloyd", "MQ6"), ("MQ4", "MQ3-Lloyd")])
def test_kernels_agree_with_torch_on_the_decoded_file(
    build: Build, checkpoint: Checkpoint, backend: Backend, tokens: np.ndarray, formats: tuple[str, str]
) -> None:
    """The same quantised weights through two implementations: rotation, sidecar and formats mean the same in both."""
    with open_hfq(build(*formats)) as file:
        stage = check_forward(file, checkpoint.config, backend, tokens)
    assert stage.ok and isinstance(stage.figures, ForwardFigures)
    assert min(row.cosine_mean for row in stage.figures.layers) > 0.99999
    assert min(row.cosine_min for row in stage.figures.layers) > 0.9999
    assert stage.figures.divergence.kld_mean < 1e-4


def test_kernels_that_do_something_else_are_found(
    build: Build,
    checkpoint: Checkpoint,
    backend: Backend,
    tokens: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel that leaves out the norm of the layer's second half, as an engine once left out columns."""
    mix = KernelModel.mix
    monkeypatch.setattr(KernelModel, "mix", lambda self, w, e, h, r: mix(self, w, e, h, (h, *r[1:])))
    with open_hfq(build()) as file:
        stage = check_forward(file, checkpoint.config, backend, tokens)
    assert "layer 0: the kernels' hidden state has a mean cosine of" in stage.complaints[0]
    assert any("mean KL divergence from the same weights" in text for text in stage.complaints)


@pytest.mark.parametrize("ids", [np.zeros((0, 4)), np.zeros((2, 0)), np.array([[-1]]), np.array([[520]])])
def test_tokens_that_cannot_be_run_are_refused(
    build: Build, checkpoint: Checkpoint, backend: Backend, ids: np.ndarray
) -> None:
    with open_hfq(build()) as file, pytest.raises(CheckError, match="token"):
        check_forward(file, checkpoint.config, backend, ids.astype(np.int64))


def test_repeats_bit_for_bit(
    build: Build, checkpoint: Checkpoint, backend: Backend, tokens: np.ndarray
) -> None:
    with open_hfq(build()) as file:
        few = tokens[:, :3]
        runs = [check_forward(file, checkpoint.config, backend, few) for _ in range(2)]
    assert runs[0].as_json()["kld_max"] == runs[1].as_json()["kld_max"]
    assert runs[0].as_json()["layers"] == runs[1].as_json()["layers"]


def test_greedy_is_the_most_likely_token_of_a_full_pass(
    build: Build, checkpoint: Checkpoint, backend: Backend, tokens: np.ndarray
) -> None:
    """Token by token with a cache gives what one pass over the whole text gives."""
    cfg = checkpoint.config
    with open_hfq(build("F32", "F32", exact=True)) as file:
        out = KernelModel(file, cfg, backend, 16).greedy(tokens[0], 3)
    text = np.concatenate([tokens[0], out])[None]
    *_, (_, hidden) = layer_by_layer(checkpoint, cfg, text)
    (values,) = logits(checkpoint, cfg, hidden)
    assert out == values.argmax(-1)[len(tokens[0]) - 1 : -1].tolist()


def test_generation_stops_at_the_end_and_at_the_capacity(
    build: Build, checkpoint: Checkpoint, backend: Backend, tokens: np.ndarray
) -> None:
    with open_hfq(build()) as file:
        model = KernelModel(file, checkpoint.config, backend, 7)
        out = model.greedy(tokens[0], 100)
        assert len(out) == 3
        assert model.greedy(tokens[0], 100, frozenset(out[:1])) == out[:1]
        stage = check_generation(file, checkpoint.config, backend, tokens[0], 3, gate=False)
    assert stage.seen == 3 and stage.as_json()["ids"] == out[:3] and isinstance(stage.as_json()["text"], str)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no word"),
        (" \n\t", "no word"),
        ("the the the cat", "'the' makes up 75%"),
        ("a b c d " * 5, "only 20%"),
        ("a sentence whose words are mostly different from each other", None),
        ("a a b b", None),
    ],
)
def test_coherence(text: str, complaint: str | None) -> None:
    found, figures = coherence(text)
    assert (found is None) if complaint is None else (found is not None and complaint in found)
    assert figures.words == len(text.split())


@pytest.mark.parametrize("gate", [True, False])
def test_an_incoherent_continuation_fails_only_where_it_is_judged(
    build: Build, checkpoint: Checkpoint, backend: Backend, monkeypatch: pytest.MonkeyPatch, gate: bool
) -> None:
    monkeypatch.setattr(generate, "SHORTEST", 2)
    monkeypatch.setattr(generate, "MOST_FREQUENT", 0.0)  # so that any text counts as a repetition
    prompt = np.array([300, 301], np.int64)
    with open_hfq(build()) as file:
        stage = check_generation(file, checkpoint.config, backend, prompt, 2, gate)
    assert stage.ok is not gate
    assert any("coherence: the word" in text for text in (stage.complaints if gate else stage.notes))


def test_reads_each_weight_once_and_only_what_is_routed(
    build: Build,
    checkpoint: Checkpoint,
    backend: Backend,
    tokens: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel_model, "RESIDENT_BYTES", 0)
    cfg = checkpoint.config
    with open_hfq(build()) as file:
        model = KernelModel(file, cfg, backend, 1)
        h, at = [model.embed(tokens[0][:1])], [model.positions(0, 1)]
        routed = [
            model.layer(layer, h, at, [model.cache()])[0].tolist() for layer in range(cfg.num_hidden_layers)
        ]
        list(model.logits(h))
        sizes = {entry.name: entry.nbytes for entry in file.entries}
    experts = {expert_name(i, e, w) for i, ids in enumerate(routed) for e in ids for w in ("w1", "w2", "w3")}
    dense = {spec.name for spec in inventory(cfg) if spec.role != "expert" and spec.role != "embed"}
    dense |= {awq_scale_name(layer) for layer in range(cfg.num_hidden_layers)}
    row = sizes["model.embed_tokens.weight"] // cfg.vocab_size
    assert len(experts) == 2 * 3 * cfg.num_experts_per_tok
    assert model.traffic.read == row + sum(sizes[name] for name in experts | dense)
    layer = max(sum(n for name, n in sizes.items() if f"layers.{i}." in name) for i in range(2))
    assert model.traffic.peak <= max(layer, sizes["lm_head.weight"] + sizes["model.norm.weight"])


def test_a_layer_of_two_formats_is_refused(
    build: Build, checkpoint: Checkpoint, backend: Backend, tokens: np.ndarray
) -> None:
    def change(_: object, tensors: Tensors) -> None:
        """Every second w2 in another format, so that any choice of experts mixes them."""
        for i, (meta, payload) in enumerate(tensors):
            if meta.name.endswith(".w2.weight") and int(meta.name.split(".")[5]) % 2:
                data = np.zeros(payload.size // 136 * 112, np.uint8)
                tensors[i] = (dataclasses.replace(meta, quant_type=20, nbytes=data.size), data)

    with open_hfq(build(change=change)) as file, pytest.raises(CheckError, match="another format"):
        check_forward(file, checkpoint.config, backend, tokens)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_forward_pass_of_nan_fails_without_any_bar(
    build: Build, checkpoint: Checkpoint, backend: Backend, tokens: np.ndarray, layer: int
) -> None:
    def change(_: object, tensors: Tensors) -> None:
        by_name(tensors)[awq_scale_name(layer)].view("<f2")[0] = math.nan

    with (
        open_hfq(build(change=change)) as file,
        pytest.raises(CheckError, match=f"layer {layer}: .* not a number"),
    ):
        check_forward(file, checkpoint.config, backend, tokens[:1, :3])
