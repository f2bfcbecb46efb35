"""The structure stage: each thing that the engine's loader needs or gets silently wrong is found, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mq_quant.formats.hfq import TensorMeta, open_hfq, write_hfq
from mq_quant.formats.minimax import awq_scale_name, expert_name
from mq_quant.verify.stages.structure import check_structure
from plainfile import Build, Change, Tensors

EXPERT = expert_name(1, 3, "w1")
DOWN = expert_name(0, 5, "w2")
SIDECAR = awq_scale_name(0)
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"


def complaints(
    build: Build, change: Change | None = None, resign: bool = True, **options: Any
) -> tuple[str, ...]:
    with open_hfq(build(change=change, resign=resign, **options)) as file:
        return check_structure(file).complaints


def index(tensors: Tensors, name: str) -> int:
    return next(i for i, (meta, _) in enumerate(tensors) if meta.name == name)


def replace(
    name: str, quant_type: int, group_size: int, payload: Callable[[TensorMeta], np.ndarray]
) -> Change:
    """Store a tensor of the same shape in another format."""

    def change(_: dict[str, Any], tensors: Tensors) -> None:
        i = index(tensors, name)
        meta = tensors[i][0]
        data = payload(meta).view(np.uint8).reshape(-1)
        tensors[i] = (TensorMeta(name, quant_type, meta.shape, group_size, data.size), data)

    return change


def drop(name: str) -> Change:
    def change(_: dict[str, Any], tensors: Tensors) -> None:
        del tensors[index(tensors, name)]

    return change


def write(name: str, dtype: str, at: int, value: float) -> Change:
    """Overwrite one number at the head of a payload."""

    def change(_: dict[str, Any], tensors: Tensors) -> None:
        tensors[index(tensors, name)][1][: 8 * (at + 1)].view(dtype)[at] = value

    return change


def test_a_sound_file_passes(build: Build) -> None:
    for gate_up, down in (("MQ2-Lloyd", "MQ4"), ("MQ3-Lloyd", "MQ3-Lloyd"), ("MQ6", "MQ4")):
        with open_hfq(build(gate_up, down)) as file:
            stage = check_structure(file)
            assert stage.ok and stage.seen == len(file.entries), stage.complaints
            assert stage.as_json()["quantization_hash"] == file.metadata["quantization_hash"]["value"]
            assert stage.as_json()["by_format"][gate_up]["tensors"] > 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop(EXPERT), EXPERT),
        (drop("lm_head.weight"), "lm_head.weight"),
        (drop(SIDECAR), SIDECAR),
        (replace(ROUTER, 1, 0, lambda m: np.ones(m.shape, np.float16)), ROUTER),
        (replace(SIDECAR, 2, 0, lambda m: np.ones(m.shape, np.float32)), SIDECAR),
        (replace(DOWN, 30, 256, lambda m: np.zeros((m.shape[0] * m.shape[1] // 256, 160), np.uint8)), DOWN),
        (
            replace(EXPERT, 20, 256, lambda m: np.zeros((m.shape[0] * m.shape[1] // 256, 112), np.uint8)),
            EXPERT,
        ),
        (write(SIDECAR, "<f2", 0, 0.0), SIDECAR),
        (write(SIDECAR, "<f2", 3, -1.0), SIDECAR),
        (write(SIDECAR, "<f2", 5, np.inf), SIDECAR),
        (write(EXPERT, "<f2", 0, 60000.0), EXPERT),
        (write(EXPERT, "<f2", 3, np.nan), EXPERT),
        (write(DOWN, "<f4", 0, np.inf), DOWN),
        (write(ROUTER, "<f2", 0, np.nan), ROUTER),
        (write("model.norm.weight", "<f4", 0, np.nan), "model.norm.weight"),
    ],
)
def test_tensors_that_the_engine_cannot_run_are_named(build: Build, change: Change, named: str) -> None:
    found = complaints(build, change)
    assert any(text.startswith(f"{named}: ") for text in found), found


def test_a_tensor_of_no_model_is_named(build: Build) -> None:
    def change(_: dict[str, Any], tensors: Tensors) -> None:
        tensors.append(
            (TensorMeta("model.layers.0.awq_scale_down.weight", 1, (4,), 0, 8), np.zeros(8, np.uint8))
        )

    assert any(
        "awq_scale_down.weight: is not a tensor of this model" in text for text in complaints(build, change)
    )


def set_key(path: str, value: Any) -> Change:
    def change(metadata: dict[str, Any], _: Tensors) -> None:
        *parents, last = path.split(".")
        where = metadata
        for key in parents:
            where = where[key]
        where[last] = value
        if value is None:
            del where[last]

    return change


def without_byte(metadata: dict[str, Any], _: Tensors) -> None:
    tokenizer = json.loads(metadata["tokenizer"])
    del tokenizer["model"]["vocab"]["Ġ"]
    metadata["tokenizer"] = json.dumps(tokenizer)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (set_key("config", None), "metadata.config"),
        (set_key("config.use_qk_norm", None), "metadata.config.use_qk_norm"),
        (set_key("config.rotary_dim", None), "metadata.config"),
        (set_key("config.head_dim", 64), "self_attn.q_proj.weight: has shape"),
        (set_key("config.num_hidden_layers", 3), "model.layers.2.input_layernorm.weight: is missing"),
        (set_key("config.hidden_size", -1), "metadata.config: config key 'hidden_size'"),
        (set_key("config.rope_theta", 10000), "metadata: architecture, config,"),
        (set_key("generation_config.eos_token_id", 3), "one of them was edited"),
        (set_key("architecture", "llama"), "metadata.architecture"),
        (set_key("tokenizer", {"model": {}}), "metadata.tokenizer"),
        (set_key("tokenizer", "{}"), "metadata.tokenizer"),
        (without_byte, "metadata.tokenizer: 1 of the 256 byte symbols"),
        (set_key("tokenizer_config", "x"), "metadata.tokenizer_config"),
        (set_key("parameter_counts", None), "metadata.parameter_counts"),
        (set_key("parameter_counts.total_params", 7), "metadata.parameter_counts.total_params"),
        (set_key("quantization_hash", None), "metadata.quantization_hash"),
        (set_key("quantization_hash.value", "0" * 16), "metadata.quantization_hash.value"),
        (set_key("quantization_hash.seed", 1), "metadata.quantization_hash.seed"),
        (set_key("quantization_hash.tensor_count", 3), "metadata.quantization_hash.tensor_count"),
    ],
)
def test_metadata_that_misleads_the_engine_is_named(build: Build, change: Change, named: str) -> None:
    found = complaints(build, change, resign=False)
    assert any(named in text for text in found), found


def test_another_architecture_number_is_named(build: Build) -> None:
    with open_hfq(build()) as file:
        pairs = [(entry, file.read(entry.name)) for entry in file.entries]
        path = file.path.with_name("other-arch.hfq")
        write_hfq(path, file.metadata_bytes, pairs, arch_id=9)
    with open_hfq(path) as file:
        assert check_structure(file).complaints == ("header: arch_id is 9, MiniMax-M2 is 10",)


def test_a_file_of_nothing_fails(build: Build) -> None:
    def change(_: dict[str, Any], tensors: Tensors) -> None:
        tensors.clear()

    found = complaints(build, change)
    assert "the stage saw no tensors" in found and any(
        "embed_tokens.weight: is missing" in text for text in found
    )
