"""Files that were tampered with: verification fails and says where, even if the hashes were made to fit again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mq_quant.formats.checkpoint.local import Checkpoint
from mq_quant.formats.errors import CheckError, HfqError
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.minimax import awq_scale_name, expert_name
from mq_quant.formats.statistics.imatrix import read_imatrix
from mq_quant.kernels.runtime.host import Backend
from mq_quant.verify.run import Verification, VerifyInputs, verify
from plainfile import Build, Change, Tensors, by_name

Judge = Callable[..., Verification]


@pytest.fixture
def judge(build: Build, checkpoint: Checkpoint, backend: Backend) -> Judge:
    def run(change: Change | None = None, resign: bool = False, **options: Any) -> Verification:
        imatrix = read_imatrix(checkpoint.path / "imatrix.gguf")
        with open_hfq(build(change=change, resign=resign, **options)) as file:
            return verify(file, backend, VerifyInputs(source=checkpoint, imatrix=imatrix, sample=True))

    return run


def problems(verdict: Verification, stage: str) -> tuple[str, ...]:
    return next(s.complaints for s in verdict.stages if s.name == stage)


def test_a_sound_file_passes(judge: Judge) -> None:
    verdict = judge()
    assert verdict.ok, [stage.complaints for stage in verdict.stages]
    assert [stage.name for stage in verdict.stages] == ["structure", "decode", "fidelity"]
    assert set(verdict.skipped) == {"forward", "predictions", "generation"}
    verdict.raise_if_failed()


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        expert_name(1, 7, "w3"),
        awq_scale_name(1),
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_one_flipped_bit_names_its_tensor(judge: Judge, name: str, place: float) -> None:
    def change(_: dict[str, Any], tensors: Tensors) -> None:
        payload = by_name(tensors)[name]
        payload[int(place * (payload.size - 1))] ^= 1

    verdict = judge(change)
    assert any(text.startswith(f"{name}: its bytes are not") for text in problems(verdict, "structure"))
    with pytest.raises(CheckError, match=name):
        verdict.raise_if_failed()


def swap(a: str, b: str) -> Change:
    def change(_: dict[str, Any], tensors: Tensors) -> None:
        found = by_name(tensors)
        found[a][:], found[b][:] = found[b].copy(), found[a].copy()

    return change


@pytest.mark.parametrize("resign", [False, True])
def test_a_swapped_pair_names_both(judge: Judge, resign: bool) -> None:
    a, b = expert_name(0, 0, "w2"), expert_name(0, 11, "w2")
    verdict = judge(swap(a, b), resign)
    found = problems(verdict, "fidelity" if resign else "structure")
    assert {text.split(":")[0] for text in found if ".experts." in text} == {a, b}


@pytest.mark.parametrize("resign", [False, True])
@pytest.mark.parametrize("factor", [2.0, 1.1])
def test_a_scaled_sidecar_is_named(judge: Judge, resign: bool, factor: float) -> None:
    def change(_: dict[str, Any], tensors: Tensors) -> None:
        scale = by_name(tensors)[awq_scale_name(1)].view("<f2")
        scale[:] = scale * np.float16(factor)

    verdict = judge(change, resign, gate_up="MQ4")
    found = problems(verdict, "fidelity" if resign else "structure")
    assert found and all(awq_scale_name(1) in text or "metadata" in text for text in found), found


@pytest.mark.parametrize("resign", [False, True])
def test_one_wrong_centroid_is_named(judge: Judge, resign: bool) -> None:
    """The least of four centroids becomes the greatest: out of order, which no encoder writes."""
    name = expert_name(0, 4, "w1")

    def change(_: dict[str, Any], tensors: Tensors) -> None:
        book = by_name(tensors)[name][72 * 100 : 72 * 100 + 8].view("<f2")
        book[0] = -8 * book[0]

    verdict = judge(change, resign)
    assert any(text.startswith(f"{name}: group 100 has centroids") for text in problems(verdict, "structure"))


@pytest.mark.parametrize("cut", [1, 4096])
def test_a_truncated_tail_names_the_tensor_it_cuts(build: Build, cut: int) -> None:
    path = build()
    with open_hfq(path) as file:
        last = file.entries[-1].name
    with path.open("r+b") as f:
        f.truncate(path.stat().st_size - cut)
    with pytest.raises(HfqError, match=last):
        open_hfq(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_theta", 10000), ("rms_norm_eps", 1e-5), ("num_experts_per_tok", 7), ("rotary_dim", 128)],
)
def test_an_edited_config_names_its_key(judge: Judge, key: str, value: Any) -> None:
    def change(metadata: dict[str, Any], _: Tensors) -> None:
        metadata["config"][key] = value

    found = problems(judge(change), "structure")
    assert any(text.startswith(f"metadata.config.{key}: is {value!r}") for text in found), found


def test_another_tokenizer_is_named(judge: Judge) -> None:
    def change(metadata: dict[str, Any], _: Tensors) -> None:
        metadata["tokenizer"] = metadata["tokenizer"].replace("bab", "bac")

    assert any(text.startswith("metadata.tokenizer:") for text in problems(judge(change), "structure"))


def test_a_stage_that_cannot_run_fails_instead_of_passing(judge: Judge) -> None:
    def change(_: dict[str, Any], tensors: Tensors) -> None:
        tensors.clear()

    verdict = judge(change, True)
    assert not verdict.ok
    assert all(not stage.ok for stage in verdict.stages)
    assert problems(verdict, "decode") == ("the stage saw no groups",)
    assert problems(verdict, "fidelity") == ("the stage saw no tensors",)
