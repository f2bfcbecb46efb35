"""The command measure: what it refuses, what it says before it starts, and what it prints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from mq_quant.quantize.cli.app import main
from mq_quant.quantize.fit.measurement import Measurement, read_measurement


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 300, (6, 16)))
    return path


def run(*arguments: object) -> int:
    try:
        main(["measure", *map(str, arguments)])
    except SystemExit as e:
        return int(e.code or 0)
    return 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--effort", "imatrix", "--calibration", "calib"), "does not look at --calibration"),
        (("--effort", "tuned"), "--effort"),
        (("--held-out", "0"), "--held-out"),
        (("--text", "a", "--tokens", "b"), "give either --text or --tokens"),
        (("--judge-tokens", "none.npy", "--sequences", "1"), r"none.npy"),
    ],
)
def test_what_cannot_be_asked(
    given: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "m.json"
    assert run("--source", "tiny", "-o", output, *given) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_input_is_not_overwritten(small: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--tokens", "--judge-tokens"):
        assert run("--source", small, option, tokens, "-o", tokens, "--force") == 2
        assert "is an input of this command" in capsys.readouterr().err


def test_a_dry_run_says_what_it_takes(
    small: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--source", small, "--tokens", tokens, "--held-out", 2, "-o", tmp_path / "m.json", "--dry-run")
    assert run(*given) == 0
    assert "calibrated on 64 tokens, compared on 32: about" in capsys.readouterr().out
    assert run(*given, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["tokens"], said["judged_tokens"]) == (64, 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens.npy"]


def test_it_prints_one_object_and_writes_the_measurement(
    small: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "m.json"
    given = (
        "--source",
        small,
        "--tokens",
        tokens,
        "--effort",
        "imatrix",
        "--imatrix",
        small / "imatrix.gguf",
    )
    assert run(*given, "--held-out", 2, "-o", output, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    found = read_measurement(output)
    assert printed["pieces"] == found.model_dump(mode="json")["pieces"]
    assert found.imatrix == hashlib.sha256((small / "imatrix.gguf").read_bytes()).hexdigest()
    assert found.calibration is None
    assert set(Measurement.model_fields) < set(printed) and printed["path"] == str(output)
    assert run(*given, "--held-out", 2, "-o", output) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "says"), [("--imatrix", "cannot be read"), ("--calibration", "is not a folder")]
)
def test_a_dry_run_looks_at_what_it_is_given(
    option: str, says: str, small: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--source", small, "--tokens", tokens, "--held-out", 2, "-o", tmp_path / "m.json", "--dry-run")
    assert run(*given, option, tmp_path / "none") == 2
    assert f"none: {says}" in capsys.readouterr().err
