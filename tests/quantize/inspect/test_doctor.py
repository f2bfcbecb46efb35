"""doctor: every probe answers on any machine, and what is missing is said with what it means."""

from __future__ import annotations

import importlib.util
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from mq_quant.kernels.runtime import cuda
from mq_quant.quantize.cli.inspect import _render_doctor
from mq_quant.quantize.inspect import doctor
from mq_quant.quantize.inspect.doctor import Examination, Finding


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # what was set when huggingface_hub was imported
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def found(name: str) -> Finding:
    return next(f for f in doctor.examine().findings if f.what == name)


def test_every_finding_has_a_state_and_a_meaning() -> None:
    result = doctor.examine()
    assert [f.what for f in result.findings] == [
        "python", "torch", "numba", "device", "c++ compiler", "hipcc", "nvrtc", "cache", "disk", "memory", "hub",
    ]  # fmt: skip
    assert all(f.found and f.meaning for f in result.findings)
    assert result.healthy == all(f.state != "missing" for f in result.findings)


def test_a_machine_without_a_compiler_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert found("c++ compiler").state == "missing"
    assert not doctor.examine().healthy


def test_offline_mode_is_said() -> None:
    assert found("hub").found == "offline mode"


@pytest.mark.parametrize("status", [200, 404, 503])
def test_a_hub_that_answers_is_reachable(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert found("hub").state == "ok"
    thread.join()
    server.server_close()


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "not a url"])
def test_a_hub_that_does_not_answer_is_a_limit(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert found("hub").state == "limited"


@pytest.mark.parametrize(
    "endpoint",
    ["http://worker:open-sesame@127.0.0.1:9", "http://worker:open-sesame@[::1", "ftp://open-sesame@h"],
)
def test_the_password_of_a_mirror_is_not_shown(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "sesame" not in str(found("hub"))


@pytest.mark.parametrize("value", ["true", "Yes", "on", "1"])
def test_offline_mode_has_several_words(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert found("hub").found == "offline mode"


def test_a_probe_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def _driver() -> Finding:
        raise RuntimeError("the driver is broken")

    monkeypatch.setattr(doctor, "PROBES", (_driver, *doctor.PROBES[:1]))
    result = doctor.examine()
    assert [f.what for f in result.findings] == ["driver", "python"]
    assert "the driver is broken" in result.findings[0].found and result.healthy


def test_no_line_is_longer_than_a_hundred_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    long = Finding("c++ compiler", "ok", "/a/very/long/path" * 20, "compiles " * 40)
    text = _render_doctor(Examination("1.0", (*doctor.examine().findings, long)))
    assert max(map(len, text.splitlines())) <= 100


def test_the_current_folder_may_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert found("disk").what == "disk"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder, whose name has a space in it, with programs that say their version if they are given the flag -O1."""
    folder = tmp_path / "my tools"
    (folder / "bin").mkdir(parents=True)
    for path in (folder / "cc", folder / "bin" / "hipcc"):
        path.write_text(f'#!/bin/sh\n[ "$*" = "-O1 --version" ] && echo "{path.name} 7.7.7"\n')
        path.chmod(0o755)
    return folder


def test_the_compiler_is_that_of_the_cpu_back_end_with_its_flags(
    monkeypatch: pytest.MonkeyPatch, tools: Path
) -> None:
    monkeypatch.setenv("CXX", f"'{tools}/cc' -O1")
    assert found("c++ compiler").found == f"cc 7.7.7 ('{tools}/cc' -O1)"


@pytest.mark.parametrize(
    ("value", "said"),
    [("/no/such/cc -O1", "/no/such/cc cannot be run"), ("'unfinished", "CXX cannot be split into words")],
)
def test_a_compiler_that_cannot_be_run_is_missing(
    monkeypatch: pytest.MonkeyPatch, value: str, said: str
) -> None:
    monkeypatch.setenv("CXX", value)
    result = found("c++ compiler")
    assert result.state == "missing" and said in result.found


def test_hipcc_is_that_of_the_hip_back_end(monkeypatch: pytest.MonkeyPatch, tools: Path) -> None:
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("ROCM_PATH", f"'{tools}' -O1")
    assert found("hipcc").found == f"hipcc 7.7.7 ('{tools}/bin/hipcc' -O1)"
    monkeypatch.setenv("ROCM_PATH", str(tools / "bin"))
    assert (found("hipcc").state, found("hipcc").found) == ("limited", "not installed")


def test_nvrtc_is_that_of_the_cuda_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "nvrtc", lambda: None)
    assert found("nvrtc").state == "limited"


def test_the_cache_is_where_it_can_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert (found("cache").state, found("cache").found) == ("ok", str(tmp_path / "mq-quant"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setenv("HOME", str(tmp_path))
    result = found("cache")
    assert result.state == "limited" and "/dev/null/mq-quant cannot be written" in result.meaning


def test_the_cores_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cores", lambda: 3)
    assert found("memory").found.endswith("3 cores")
