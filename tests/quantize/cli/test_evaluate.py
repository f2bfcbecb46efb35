"""`mq-quant evaluate` and `card` as a user meets them: exit codes, JSON, and messages that name the fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damaged import resign
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.minimax import awq_scale_name
from mq_quant.quantize.cli.app import main
from mq_quant.quantize.pipeline.build import BuildResult

Evaluate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mq(
    run: Callable[..., BuildResult],
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Evaluate:
    """Run a command in a folder with small.mq4, small.mq2 and ids.npy: (exit code, stdout, stderr)."""
    for tier in ("mq4", "mq2"):
        run(f"small.{tier}", tier=tier, fit="reference")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 300, (2, 16)))
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as e:
            main([argument.replace("SMALL", str(small)) for argument in arguments])
        out, err = capsys.readouterr()
        return int(e.value.code or 0), out, err

    return command


def test_from_files_to_a_card(mq: Evaluate, tmp_path: Path) -> None:
    """The source once, then its saved predictions, then the card of both files with its pictures."""
    tokens = ("--tokens", "ids.npy")
    code, out, err = mq(
        "evaluate",
        "small.mq4",
        "small.mq2",
        "--source",
        "SMALL",
        *tokens,
        "--save-reference",
        "saved",
        "--pictures",
        "p",
    )
    assert code == 0, err
    header, first, second, against = out.splitlines()
    assert header.split()[:4] == ["file", "size", "KLD", "±"]
    assert first.startswith("small.mq4 ") and second.startswith("small.mq2 ")
    assert "at 32 positions of 2 sequences of 16 tokens" in against and "judged by 32 positions only" in err
    assert "memory about" in err
    assert {p.name for p in (tmp_path / "p").iterdir()} == {
        f"{name}.{kind}"
        for name in ("kld-by-size", "error-by-layer-small.mq4", "error-by-layer-small.mq2")
        for kind in ("png", "svg")
    }
    code, out, _ = mq("evaluate", "small.mq2", "--reference", "saved", "-o", "again.json", "--json")
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "again.json").read_text())
    assert json.loads(out)["reference"] == "saved"
    code, out, _ = mq(
        "card", "small.mq4", "small.mq2", "--evaluation", "evaluation.json", "-o", "card", "--json"
    )
    assert code == 0 and json.loads(out)["pictures"] == ["kld-by-size.png", "kld-by-size.svg"]
    assert "± " in (tmp_path / "card" / "README.md").read_text("utf-8").replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "give either --source or --reference"),
        (("--source", "SMALL", "--reference", "x"), "give either --source or --reference"),
        (("--reference", "x", "--tokens", "ids.npy"), "holds its own tokens"),
        (("--reference", "x"), "cannot be read"),
        (("--reference", "ids.npy"), "holds no saved predictions"),
        (("--source", "SMALL", "--tokens", "ids.npy", "-o", "small.mq4"), "is an input of this command"),
        (
            ("--source", "SMALL", "--tokens", "ids.npy", "--save-reference", "ids.npy"),
            "is an input of this command",
        ),
        (("--source", "./nowhere"), "no such folder"),
    ],
)
def test_what_cannot_be_used_is_refused(mq: Evaluate, arguments: tuple[str, ...], text: str) -> None:
    code, out, err = mq("evaluate", "small.mq4", *arguments)
    assert code in (1, 2) and out == "" and text in err and "Traceback" not in err


def test_a_broken_file_is_exit_code_1_and_the_result_stands(mq: Evaluate, tmp_path: Path) -> None:
    with open_hfq(tmp_path / "small.mq4") as file:
        at = file.entry(awq_scale_name(1)).offset
    with (tmp_path / "small.mq4").open("r+b") as f:
        f.seek(at)
        f.write(np.array([np.nan], "<f2").tobytes())
    resign(tmp_path / "small.mq4")
    code, out, err = mq(
        "evaluate", "small.mq4", "small.mq2", "--source", "SMALL", "--tokens", "ids.npy", "--json"
    )
    assert code == 1 and "the predictions of small.mq4 are not numbers" in err
    klds = [f["divergence"]["kld_mean"] for f in json.loads(out)["files"]]
    assert klds[0] is None and klds[1] > 0
    assert (tmp_path / "evaluation.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("none.mq4", "--source", "SMALL"), "none.mq4: cannot be opened"),
        (("small.mq4", "--source", "SMALL", "-o", "none/e.json"), "its folder does not exist"),
        (("small.mq4", "--source", "SMALL", "--pictures", "ids.npy"), "ids.npy: is not a folder"),
        (("small.mq4", "--source", "SMALL", "--save-reference", "."), "is a folder"),
    ],
)
def test_what_cannot_be_used_is_told_before_the_source_is_read(
    mq: Evaluate, arguments: tuple[str, ...], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*_: object) -> None:
        raise AssertionError("the source was opened")

    monkeypatch.setattr("mq_quant.quantize.spec.places.checked_place", unread)
    code, _, err = mq("evaluate", *arguments, "--tokens", "ids.npy")
    assert code == 2 and text in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "small.mq4", "--reference", "ids.npy"),
        ("evaluate", "small.mq4", "--reference", "none"),
        ("card", "small.mq4", "-o", "card", "--evaluation", "ids.npy"),
        ("card", "small.mq4", "small.mq4", "-o", "card"),
    ],
)
def test_an_input_that_is_none_is_exit_code_2(mq: Evaluate, arguments: tuple[str, ...]) -> None:
    code, out, _ = mq(*arguments)
    assert (code, out) == (2, "")
