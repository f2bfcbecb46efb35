"""A build on a device: the file of the CPU, from any number of threads, begun on one and continued on the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_hooks import stopped
from mq_quant.formats.blocks import MQ2_LLOYD
from mq_quant.formats.errors import BackendError
from mq_quant.formats.hfq.stored import StoredForm
from mq_quant.kernels.runtime.cpu import CpuBackend
from mq_quant.kernels.runtime.host import open_backend
from mq_quant.quantize.cli.app import main
from mq_quant.quantize.encode import gpu_encoder
from mq_quant.quantize.encode.encoders import CPU, MatrixTask, open_encoder
from mq_quant.quantize.encode.gpu_encoder import GpuEncoder
from mq_quant.quantize.pipeline.build import BuildResult
from mq_quant.quantize.pipeline.statistics import NoStatistics
from mq_quant.quantize.spec import places

Run = Callable[..., BuildResult]


@pytest.fixture(scope="module")
def device():
    """The kernels on the CPU back end, as a device."""
    opened = GpuEncoder(lambda: open_backend("cpu"))
    yield opened
    opened.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": None},
        {"fit": "exact"},
        {"gain": False, "tier": "mq4"},
        {"statistics": NoStatistics(), "alpha": None, "tier": "mq3"},
        {"fit": "reference"},
    ],
    ids=lambda c: ", ".join(map(str, c)),
)
def test_the_file_is_that_of_the_cpu(
    run: Run, tmp_path: Path, device: GpuEncoder, changes: dict[str, Any]
) -> None:
    run("cpu", **changes)
    result = run("device", encoder=device, jobs=3, **changes)
    assert (tmp_path / "device").read_bytes() == (tmp_path / "cpu").read_bytes()
    assert result.device == device.device


def test_a_build_continues_on_another_device(run: Run, tmp_path: Path, device: GpuEncoder) -> None:
    run("whole")
    with stopped(15) as hook:
        run("out", jobs=1, on_begin=hook)
    assert run("out", encoder=device).resumed_units > 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_every_device_opens_its_own_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def opens(kind: str, *, index: int, **_: bool) -> Any:
        opened.append((kind, index))
        return open_backend("cpu", threads=1)

    monkeypatch.setattr(gpu_encoder, "devices", lambda kind: 3 if kind == "cuda" else 0)
    monkeypatch.setattr(gpu_encoder, "open_backend", opens)
    with open_encoder("cuda") as found:
        task = MatrixTask(np.ones((1, 256), np.float32), StoredForm(MQ2_LLOYD), "exact")
        assert len({found.encode([task])[0].tobytes() for _ in range(3)}) == 1
    assert sorted(set(opened)) == [("cuda", n) for n in range(3)] and len(opened) == 24
    opened.clear()
    with open_encoder("cuda:2"):
        assert opened == [("cuda", 2)] * 8


def test_devices_of_another_kind_take_no_part() -> None:
    closed = []

    class Other(CpuBackend):
        def __init__(self) -> None:
            super().__init__(threads=1)
            self.device = "another kind"

        def close(self) -> None:
            closed.append(self)
            super().close()

    opened = GpuEncoder(lambda: open_backend("cpu", threads=1), Other, streams=2)
    try:
        assert len(closed) == 1
        assert {opened.on_stream(lambda encoder, place: place) for _ in range(4)} == {0}
    finally:
        opened.close()


def test_a_fault_on_the_device_reaches_who_asked(device: GpuEncoder) -> None:
    task = MatrixTask(np.ones((1, 300), np.float32), StoredForm(MQ2_LLOYD), "exact")
    with pytest.raises(Exception, match=r"300|reshape|fit|size"):
        device.encode([task])
    good = MatrixTask(np.ones((1, 256), np.float32), StoredForm(MQ2_LLOYD), "exact")
    np.testing.assert_array_equal(device.encode([good])[0], CPU.encode([good])[0])


def test_the_cpu_needs_nothing() -> None:
    with open_encoder("cpu") as found:
        assert found is CPU


def test_a_name_that_is_no_device_is_refused() -> None:
    with (
        pytest.raises(BackendError, match=r"no device 'gpu'\n  choose one of cpu, cuda, hip"),
        open_encoder("gpu"),
    ):
        pass


@pytest.mark.parametrize("name", ["cuda", "hip"])
def test_what_a_device_lacks_is_said_before_anything_is_read(
    name: str, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(kind: str, **_: bool) -> Any:
        raise BackendError(f"the {kind} back end finds no driver")

    monkeypatch.setattr(gpu_encoder, "devices", lambda kind: 0)
    monkeypatch.setattr(gpu_encoder, "open_backend", missing)
    monkeypatch.setattr(places, "open_place", lambda *_: pytest.fail("the source was opened"))
    with pytest.raises(SystemExit) as stopped:
        main(["build", "--tier", "mq2", "--source", str(small), "--device", name])
    assert stopped.value.code == 2
    assert f"the {name} back end finds no driver\n  use --device cpu" in capsys.readouterr().err


def test_cuda_is_an_amd_gpu_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch."""
    monkeypatch.setattr(gpu_encoder, "devices", lambda kind: int(kind == "hip"))
    opened = {"hip": lambda: open_backend("cpu")}
    monkeypatch.setattr(gpu_encoder, "open_backend", lambda kind, **_: opened[kind]())
    with open_encoder("cuda") as found:
        assert found.device.startswith("CPU")
