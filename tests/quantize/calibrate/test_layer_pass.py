"""Which devices a layer runs on, how many layers they hold, and what a manifest says of them: sums of one GPU are not
continued on another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_model
import torch
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.errors import ResumeError
from mq_quant.formats.minimax import parse_config
from mq_quant.quantize.calibrate import layer_pass
from mq_quant.quantize.calibrate.layer_pass import (
    device_record,
    layers_held,
    make_room,
    open_device,
    with_others,
)
from mq_quant.quantize.calibrate.run import CalibrationOptions, calibrate
from mq_quant.quantize.spec.calibration_sizes import ROUND
from mq_quant.quantize.spec.places import model_files
from mq_quant.quantize.spec.recipe import load_model
from mq_quant.verify.model.spread_forward import EXPERTS
from watching import Heard

TOKENS = np.random.default_rng(0).integers(0, 300, (1, 16)).astype(np.int32)


@pytest.mark.parametrize(
    ("gpus", "gib", "held"),
    [(1, 141, 2), (2, 141, 3), (8, 141, 3), (1, 24, 1), (4, 32, 1), (1, 40, 2), (8, 36, 2), (8, 44, 3)],
)
def test_several_gpus_hold_more_layers_where_they_have_room(
    monkeypatch: pytest.MonkeyPatch, gpus: int, gib: int, held: int
) -> None:
    """A layer of M2.7 takes about 20 GB at 65,536 tokens."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, gib << 30))
    config = parse_config(model_files(load_model("minimax-m2.7")).config)
    assert layers_held(config, 1 << 16, [torch.device("cuda", n) for n in range(gpus)]) == held


def test_a_gpu_has_room_for_the_experts_that_run_before_any_is_added() -> None:
    assert ROUND == EXPERTS


@pytest.mark.parametrize(
    ("reserved", "most", "given"),
    [(13, 0.5, True), (11, 0.5, False), (1, 0.0, True), (0, 0.0, False)],
)
def test_what_torch_holds_in_reserve_is_given_back_where_it_is_much(
    monkeypatch: pytest.MonkeyPatch, reserved: int, most: float, given: bool
) -> None:
    """On a GPU of 24 GiB."""
    calls: list[bool] = []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved << 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 24 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(True))
    make_room([torch.device("cpu")], most)
    assert not calls
    make_room([torch.device("cpu"), torch.device("cuda", 0)], most)
    assert bool(calls) == given


class StopError(Exception):
    """An interruption."""


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_record(torch.device("cpu")) == {"device": "cpu"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Radeon 8060S")
    assert device_record(torch.device("cuda")) == {"device": "cuda", "gpu": "Radeon 8060S"}


def test_gpus_of_one_kind_help_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: "another" if n == 2 else "H200")
    assert [device.index for device in with_others(open_device("cuda"))] == [None, 1, 3]
    assert open_device("cuda:3").index == 3
    for name in ("cpu", "cuda:0", "cuda:3"):
        assert with_others(open_device(name)) == (torch.device(name),)


def test_a_calibration_is_not_continued_on_another_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(small_model.save(tmp_path / "small", small_model.tensors()))

    def stop(doing: str) -> None:
        if doing == "layer 1":
            raise StopError

    def run(gpu: str, **hooks: Any) -> int:
        monkeypatch.setattr(layer_pass, "device_record", lambda device: {"device": "cuda", "gpu": gpu})
        return calibrate(source, TOKENS, tmp_path / "calib", CalibrationOptions(**hooks)).resumed_layers

    with pytest.raises(StopError):
        run("H100", watch=Heard(then=stop))
    with pytest.raises(ResumeError, match="gpu is 'H100' there and 'H200' here"):
        run("H200")
    assert run("H100") == 1
