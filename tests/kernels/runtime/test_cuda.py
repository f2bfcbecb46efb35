"""The cuda back end without an NVIDIA GPU: what is missing is named. With one, the other kernel tests run on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from mq_quant.formats.errors import BackendError
from mq_quant.kernels.runtime import cuda
from mq_quant.kernels.runtime.cuda import CudaBackend
from mq_quant.kernels.runtime.drivers import CUDA
from mq_quant.kernels.runtime.sources import Module, Sources

needs_nvrtc = pytest.mark.skipif(cuda.nvrtc() is None, reason="needs nvrtc (pip install nvidia-cuda-nvrtc)")


def test_a_machine_without_the_driver_is_told_so():
    kind = type("OtherCuda", (CudaBackend,), {"driver": replace(CUDA, libraries=("libno-cuda.so.1",))})
    assert not kind.available()
    with pytest.raises(BackendError, match=r"libno-cuda\.so\.1 does not load\n  install the NVIDIA driver"):
        kind()


def test_a_machine_without_nvrtc_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(cuda, "nvrtc", lambda: None)
    assert cuda.nvrtc_version() == "none"
    with pytest.raises(BackendError, match=r"finds no nvrtc\n  pip install mq-quant\[cuda\]"):
        cuda.compile_module(Sources(), Module("vector.hip"), "sm_90")


@needs_nvrtc
def test_modules_become_code_for_the_architecture():
    code, _ = cuda.compile_module(Sources(), Module("vector.hip"), "sm_90")
    assert code[:4] == b"\x7fELF"
    assert int.from_bytes(code[18:20], "little") == 190


@needs_nvrtc
def test_what_nvrtc_says_is_shown(tmp_path):
    (tmp_path / "k.hip").write_text('#include "device.h"\nKERNEL(32) k(int n) { nonsense; }\n')
    with pytest.raises(BackendError, match=r"k\.hip does not compile with nvrtc:\n(.|\n)*nonsense"):
        cuda.compile_module(Sources(tmp_path), Module("k.hip"), "sm_90")
