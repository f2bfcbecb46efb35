"""Closed streams, poor encodings, readers that leave: a finished command ends as it should, and in no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mq_quant.quantize.cli.streams import READER_GONE

GOLDEN = Path(__file__).parents[2] / "golden" / "container.hfq"
PLAIN_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def mq(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, its stdout and stderr read unless `options` say otherwise."""
    command = [sys.executable, "-c", "from mq_quant.quantize.cli.app import main; main()", *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **options.pop("env", {})}
    return subprocess.run(command, text=True, check=False, env=environment, **options)


def build(source: Path, output: object) -> list[object]:
    return ["build", "--tier", "mq2", "--source", source, "--no-imatrix", "-o", output]


def closing(number: int) -> Callable[[], None]:
    return lambda: os.close(number)


def unread() -> int:
    """The writing end of a pipe whose reader has left."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.fixture(scope="module")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a build whose streams are open."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert mq(*build(small, out)).returncode == 0
    return out.read_bytes()


@pytest.mark.parametrize(("stream", "number"), [("stdin", 0), ("stdout", 1), ("stderr", 2)])
def test_a_closed_stream_does_not_end_a_build_nor_write_into_its_file(
    stream: str, number: int, small: Path, whole: bytes, tmp_path: Path
) -> None:
    done = mq(*build(small, tmp_path / "closed"), **{stream: None}, preexec_fn=closing(number))
    assert done.returncode == 0
    assert (tmp_path / "closed").read_bytes() == whole


def test_with_stderr_closed_bad_input_is_still_exit_code_2(tmp_path: Path) -> None:
    assert mq(*build(tmp_path / "none", "x"), stderr=None, preexec_fn=closing(2)).returncode == 2


def test_a_build_whose_reader_has_left_is_a_build(small: Path, tmp_path: Path) -> None:
    writing = unread()
    done = mq(*build(small, tmp_path / "out"), stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out").is_file()


@pytest.mark.parametrize(
    "command",
    [
        ("--help",),
        ("build", "-h"),
        ("--version",),
        ("tiers",),
        ("inspect", GOLDEN),
        ("inspect", GOLDEN, "--json"),
    ],
)
def test_what_only_shows_ends_silently_when_its_reader_leaves(command: tuple[object, ...]) -> None:
    writing = unread()
    done = mq(*command, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (READER_GONE, "")


def test_a_verdict_is_kept_when_its_reader_leaves(tmp_path: Path) -> None:
    writing = unread()
    assert mq("diff", GOLDEN, GOLDEN, stdout=writing).returncode == 0
    (tmp_path / "other").write_bytes(GOLDEN.read_bytes()[:-1] + b"\1")
    assert mq("diff", GOLDEN, tmp_path / "other", stdout=writing).returncode == 1
    os.close(writing)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the machine has no /dev/full")
def test_a_stdout_that_is_full_is_told(small: Path, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = mq("inspect", GOLDEN, stdout=full)
        assert done.returncode == 1
        assert "cannot be printed" in done.stderr and "Traceback" not in done.stderr
        done = mq(*build(small, tmp_path / "out"), stdout=full)
        assert done.returncode == 0
        assert "cannot be printed" in done.stderr
        assert mq(*build(small, tmp_path / "other"), "--json", stdout=full).returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the machine has no /dev/full")
@pytest.mark.parametrize(
    "command",
    [
        ("--help",),
        ("build", "-h"),
        ("--version",),
        ("tiers", "--json"),
        ("diff", GOLDEN, GOLDEN),
        ("doctor",),
    ],
)
def test_pages_and_verdicts_that_cannot_be_printed_are_one_error(command: tuple[object, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = mq(*command, stdout=full)
    assert done.returncode == 1
    assert "cannot be printed: No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) <= 2 and "--debug" not in done.stderr


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, r"gr\xf6\xdfer.mq2"),
        (
            PLAIN_LOCALE,
            r"gr\udcc3\udcb6\udcc3\udc9fer.mq2",
        ),  # bytes, which stand for no letters in that locale
    ],
)
def test_characters_that_stdout_lacks_are_escaped(
    settings: dict[str, str], shown: str, small: Path, tmp_path: Path
) -> None:
    name = tmp_path / "größer.mq2"
    done = mq(*build(small, name), env=settings)
    assert done.returncode == 0
    assert name.is_file()
    assert shown in done.stdout
    document = json.loads(mq("inspect", name, "--json", env=settings).stdout)
    assert os.fsencode(document["path"]) == os.fsencode(name)


@pytest.mark.parametrize("command", ["build", "calibrate", "verify", "doctor"])
def test_help_needs_no_locale(command: str) -> None:
    done = mq(command, "--help", env=PLAIN_LOCALE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Examples:" in done.stdout


def test_a_name_that_is_no_text_can_be_built_and_inspected(small: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/out-\xff\xe9.mq2"
    built = mq(*build(small, name), "--json")
    assert built.returncode == 0, built.stderr
    assert os.path.isfile(name)  # noqa: PTH113
    assert os.fsencode(json.loads(built.stdout)["path"]) == name
    assert "out-\\udcff\\udce9.mq2" in mq("inspect", name).stdout


def test_a_deleted_current_folder_does_not_matter_to_absolute_paths(small: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()

    def leave() -> None:
        os.chdir(gone)
        gone.rmdir()

    done = mq(*build(small, tmp_path / "out"), preexec_fn=leave)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").is_file()


def test_texts_go_to_stdout_where_that_is_asked_for(tmp_path: Path) -> None:
    for line in (
        ["recipes", "mq2", "--copy"],
        ["plan", "--source", "tiny", "--bits", "3.8", "--write-recipe"],
    ):
        done = mq(*line, "/dev/stdout", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "schema: 1" in done.stdout
        with (tmp_path / "log").open("w") as log:
            assert mq(*line, "/dev/stdout", cwd=tmp_path, stdout=log).returncode == 0
        assert (tmp_path / "log").read_text() == done.stdout
        assert mq(*line, "/dev/null", cwd=tmp_path).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize("command", ["evaluate x", "measure"])
def test_results_beside_which_unfinished_work_lies_do_not(command: str) -> None:
    done = mq(*command.split(), "--source", "tiny", "-o", "/dev/stdout")
    assert done.returncode == 2
    assert "/dev/stdout: is no plain file" in done.stderr and "--json prints the result" in done.stderr
