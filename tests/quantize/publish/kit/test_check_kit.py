"""The runner of a kit, as an author of an engine starts it: without our package, and with whatever is written to it."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mq_quant.quantize.publish.kit.check_kit import judge, left_out

Results = Path
HEAD = 24


@pytest.fixture
def results(kit: Path, tmp_path: Path) -> Results:
    """What an engine without faults writes of the hidden states and logits."""
    folder = tmp_path / "results"
    folder.mkdir()
    for prompt in ("one", "eight"):
        for kind in ("hfhs", "logits.f32"):
            shutil.copy(kit / "small" / f"{prompt}.{kind}", folder / f"small.{prompt}.{kind}")
    return folder


def run(kit: Path, results: Path) -> tuple[int, str, str]:
    """The runner in an interpreter without site-packages."""
    command = [sys.executable, "-I", "-S", str(kit / "check_kit.py"), str(results)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_right_results_pass_and_missing_ones_are_listed(kit: Path, results: Results) -> None:
    code, out, err = run(kit, results)
    assert (code, err) == (0, "")
    assert "4 results judged: all are right" in out
    assert (
        "not judged, since it is not there: vectors.gate-up.f32, vectors.down.f32, vectors.matvec.f32" in out
    )


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("small.one.hfhs", lambda raw: b"", "does not begin with HFHS"),
        ("small.one.hfhs", lambda raw: b"GGUF" + raw[4:], "does not begin with HFHS"),
        ("small.one.hfhs", lambda raw: raw[:-4], "has not the 2072 bytes of 1 layers"),
        ("small.one.hfhs", lambda raw: raw + b"1234", "has not the 2072 bytes of 1 layers"),
        ("small.one.hfhs", lambda raw: raw[:8] + struct.pack("<IIII", 0, 0, 0, 0), "has not the 24 bytes"),
        ("small.one.hfhs", lambda raw: raw[:8] + struct.pack("<I", 2) + raw[12:] + raw[HEAD:], "(2, 1, 512)"),
        ("small.eight.logits.f32", lambda raw: raw[:-1], "bytes from byte 0 on, not"),
        ("small.eight.logits.f32", lambda raw: raw[:-4], "bytes from byte 0 on, not"),
        ("vectors.down.f32", lambda raw: b"12345", "bytes from byte 0 on, not"),
    ],
)
def test_results_that_cannot_be_read_are_refused_by_name(
    name: str, change: Callable[[bytes], bytes], said: str, kit: Path, results: Results
) -> None:
    path = results / name
    path.write_bytes(change(path.read_bytes() if path.is_file() else b""))
    code, _, err = run(kit, results)
    assert code == 2 and said in err and name in err and "Traceback" not in err


def test_a_folder_without_results_is_refused(kit: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        code, _, err = run(kit, folder)
        assert code == 2 and "holds no result of this kit, such as vectors.gate-up.f32" in err


@pytest.mark.parametrize(
    "manifest",
    [
        None,
        "",
        "[]",
        '{"schema": 2}',
        '{"schema": 1}',
        '{"schema": 1, "models": [{"name": "../x", "prompts": []}], "vectors": {"kernels": {}}}',
        '{"schema": 1, "models": [{"name": "small", "prompts": [{"name": "one"}]}], "vectors": {"kernels": {}}}',
        '{"schema": 1, "models": 3, "vectors": 4}',
    ],
)
def test_a_broken_manifest_is_refused(
    manifest: str | None, kit: Path, results: Results, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(kit, copy)
    (copy / "kit.json").unlink()
    if manifest is not None:
        (copy / "kit.json").write_text(manifest)
    code, _, err = run(copy, results)
    assert code == 2 and "kit.json" in err and "Traceback" not in err


def changed(path: Path, change: Callable[[np.ndarray], None], offset: int = HEAD) -> None:
    raw = bytearray(path.read_bytes())
    values = np.frombuffer(raw, "<f4", offset=offset)
    change(values)
    path.write_bytes(bytes(raw))


def test_a_fault_that_nobody_knows_is_told_by_its_layer(kit: Path, results: Results) -> None:
    def shake(values: np.ndarray) -> None:
        values += np.random.default_rng(1).normal(size=values.size) * values.std()

    changed(results / "small.eight.hfhs", shake)
    code, out, _ = run(kit, results)
    assert code == 1 and "small, prompt eight: layer 0 departs" in out and "as no known fault does" in out


def test_numbers_that_are_none_depart(kit: Path, results: Results) -> None:
    def spoil(values: np.ndarray) -> None:
        values[7] = np.nan

    changed(results / "small.one.hfhs", spoil)
    changed(results / "small.eight.logits.f32", spoil, 0)
    code, out, _ = run(kit, results)
    assert code == 1 and "layer 0 departs (cosine nan): it holds values that are no numbers" in out
    assert "logits depart (cosine nan)" in out


def test_a_known_fault_is_named_with_its_projection(kit: Path, results: Results) -> None:
    manifest = json.loads((kit / "kit.json").read_text())
    suspects = manifest["models"][0]["prompts"][1]["suspects"]
    states = {s["faults"][0]["id"]: kit / "small" / s["states"] for s in suspects}
    assert {"down-512", "down-1024", "norm-per-head", "bias-in-weight", "bias-ignored"} <= set(states)
    right = np.fromfile(kit / "small" / "eight.hfhs", np.uint8)
    for name, path in states.items():
        last = path.read_bytes()
        (results / "small.eight.hfhs").write_bytes(right.tobytes()[: -len(last)] + last)
        (named,) = (s["faults"] for s in suspects if s["faults"][0]["id"] == name)
        (finding,) = judge(kit, results).findings
        assert finding.faults == tuple(fault["id"] for fault in named)
        assert f": {named[0]['projection']}: {named[0]['sentence']}" in finding.problem


@pytest.mark.parametrize(
    ("kept", "groups", "said"),
    [
        (0b1, 3, "columns 256 to 767 are"),
        (0b101, 4, "columns 256 to 511, 768 to 1023 are"),
        (0, 1, "columns 0 to 255 are"),
    ],
)
def test_columns_that_are_left_out_in_words(kept: int, groups: int, said: str) -> None:
    assert said in left_out(kept, groups)
