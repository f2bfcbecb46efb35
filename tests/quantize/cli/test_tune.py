"""The command `tune`: a new file beside the old one, one JSON object, and errors in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mq_quant.quantize.cli.app import main
from mq_quant.quantize.pipeline.build import BuildResult

Mq = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mq(
    capsys: pytest.CaptureFixture[str],
    run: Callable[..., BuildResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Mq:
    """Runs a command line in a folder with a file `made.mq2` and tokens `ids.npy`; returns code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    run("made.mq2")
    np.save("ids.npy", np.random.default_rng(0).integers(0, 300, (6, 32)))
    capsys.readouterr()

    def run_line(*arguments: object) -> tuple[int, str, str]:
        try:
            main([str(a) for a in arguments])
            code = 0
        except SystemExit as e:
            code = int(e.code or 0)
        return code, *capsys.readouterr()

    return run_line


def test_one_json_object_and_a_new_file(mq: Mq, small: Path, tmp_path: Path) -> None:
    code, out, err = mq("tune", "made.mq2", "--source", small, "--tokens", "ids.npy", "--epochs", 1, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["path"] == "made.tuned.mq2" and result["tokens"] == 6 * 32
    assert [layer["layer"] for layer in result["layers"]] == [0, 1]
    assert (tmp_path / "made.tuned.mq2").stat().st_size == result["total_bytes"]


def test_text_is_for_people(mq: Mq, small: Path) -> None:
    code, out, err = mq(
        "tune", "made.mq2", "--source", small, "--tokens", "ids.npy", "--epochs", 1, "-o", "x.mq2"
    )
    assert code == 0 and out.startswith("x.mq2: ")
    assert "of 2 layers, on 192 tokens" in out and "before" in out
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("made.mq2", "--tokens", "ids.npy", "-o", "made.mq2", "--force"), "is an input of this command"),
        (("none", "--tokens", "ids.npy"), "none: cannot be opened"),
        (("ids.npy", "--tokens", "ids.npy"), "is not an HFQ file"),
        (("made.mq2", "--tokens", "none.npy"), "none.npy"),
        (("made.mq2", "--tokens", "ids.npy", "--sequences", 7), "fewer than the 7 asked for"),
        (("made.mq2", "--tokens", "ids.npy", "--text", "ids.npy"), "give either --text or --tokens"),
        (("made.mq2", "--tokens", "ids.npy", "-o", "no/where"), "its folder does not exist"),
    ],
)
def test_bad_input_is_one_error(mq: Mq, small: Path, arguments: tuple[object, ...], says: str) -> None:
    code, out, err = mq("tune", *arguments, "--source", small)
    assert (code, out) == (2, "")
    assert says in err and "Traceback" not in err
