"""A file as a source of weights: rows, folds, and shapes that are not those of its config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from mq_quant.formats.checkpoint.local import Checkpoint
from mq_quant.formats.errors import HfqError, HfqKind
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.minimax import expert_name
from mq_quant.kernels.runtime.host import Backend
from mq_quant.verify.against_source import check_dimensions
from mq_quant.verify.model.hfq_weights import DecodedFile, check_shapes
from mq_quant.verify.model.kernel_forward import KernelModel
from mq_quant.verify.run import VerifyInputs, verify
from plainfile import Build, Change, Tensors

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = expert_name(0, 1, "w3")


def reshaped(name: str, *shape: int) -> Change:
    """The same bytes under another shape."""

    def change(_: dict[str, Any], tensors: Tensors) -> None:
        at = next(i for i, (meta, _) in enumerate(tensors) if meta.name == name)
        tensors[at] = (replace(tensors[at][0], shape=shape), tensors[at][1])

    return change


def configured(**keys: int) -> Change:
    return lambda metadata, _: metadata["config"].update(keys)


@pytest.mark.parametrize("name", [EMBED, UP, expert_name(1, 3, "w2")])
def test_rows_are_those_of_the_whole(build: Build, name: str) -> None:
    with open_hfq(build()) as file:
        weights = DecodedFile(file)
        whole = weights.weight(name)
        for low, high in ((0, 1), (3, 200), (0, len(whole)), (7, 7)):
            np.testing.assert_array_equal(weights.rows(name, low, high), whole[low:high])
        for low, high in ((-1, 3), (5, 4), (0, len(whole) + 1)):
            with pytest.raises(ValueError, match="are not inside"):
                weights.rows(name, low, high)


def test_a_fold_is_undone_where_it_is_given(build: Build) -> None:
    with open_hfq(build()) as file:
        weights = DecodedFile(file)
        fold = np.exp2(np.arange(256) % 5 - 2).astype(np.float32)
        np.testing.assert_array_equal(weights.weight(UP, fold), weights.weight(UP) * fold[:, None])
        down = UP.replace("w3", "w2")
        np.testing.assert_array_equal(weights.weight(down, fold), weights.weight(down) / fold)
        np.testing.assert_array_equal(weights.weight(HEAD, fold), weights.weight(HEAD))


SHAPES = [
    (EMBED, (520 * 256,)),
    (EMBED, (2, 260 * 256)),
    (HEAD, (1, 520, 256)),
    ("model.layers.0.self_attn.q_proj.weight", (131072,)),
    ("model.layers.1.block_sparse_moe.gate.weight", (1, 12 * 256)),
    ("model.layers.0.input_layernorm.weight", (2, 128)),
    (expert_name(1, 2, "w1"), (65536,)),
    (UP, (1, 65536)),
]


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_a_file_of_other_shapes_than_its_config_is_judged_and_never_run(
    build: Build, checkpoint: Checkpoint, backend: Backend, name: str, shape: tuple[int, ...]
) -> None:
    ids = np.arange(6)[None]
    with open_hfq(build(change=reshaped(name, *shape))) as file:
        for use in (check_shapes, lambda f, c: KernelModel(f, c, backend, 8)):
            with pytest.raises(HfqError, match="config calls for") as e:
                use(file, checkpoint.config)
            assert (e.value.tensor, e.value.kind) == (name, HfqKind.OTHER_SHAPE)
        judged = verify(
            file,
            backend,
            VerifyInputs(source=checkpoint, tokens=ids, prompt=ids[0], generate=1, sample=True, fewest=1),
        )
    judged = {stage.name: stage for stage in judged.stages}
    assert set(judged) == {"structure", "decode", "forward", "fidelity", "predictions", "generation"}
    for stage in ("structure", "forward", "predictions", "generation"):
        assert any(name in text for text in judged[stage].complaints), stage


@pytest.mark.parametrize(
    ("key", "value"),
    [("vocab_size", 100), ("vocab_size", 5000), ("num_local_experts", 8), ("num_attention_heads", 8)],
)
def test_models_of_other_dimensions_are_not_compared(
    build: Build, checkpoint: Checkpoint, backend: Backend, key: str, value: int
) -> None:
    ids = np.arange(6)[None]
    with open_hfq(build(change=configured(**{key: value}))) as file:
        judged = verify(file, backend, VerifyInputs(source=checkpoint, tokens=ids, sample=True))
    judged = {stage.name: stage.complaints for stage in judged.stages}
    was = getattr(checkpoint.config, key)
    for stage in ("fidelity", "predictions"):
        assert any(f"{key} is {value}, the source's {was}" in text for text in judged[stage])


def test_what_does_not_reach_a_shape_may_differ(build: Build, checkpoint: Checkpoint) -> None:
    with open_hfq(build()) as file:
        check_dimensions(file, replace(checkpoint.config, rope_theta=1.0), checkpoint.config)
