"""Every example of the README: console blocks are run in order, other lines are parsed against the real options."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path

import pytest
import typer.main
from mq_quant.quantize.cli.app import app, main
from mq_quant.quantize.spec.estimates import tier_table

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
EXIT_CODE = re.compile(r"# exit code (\d)")


def lines(kind: str) -> list[str]:
    blocks = (block for name, block in BLOCKS if name == kind)
    return [
        line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readme")
    for kind, block in BLOCKS:
        if kind == "yaml" and (name := re.match(r"# ([\w.-]+\.yaml)\n", block)):
            (path / name[1]).write_text(block)
    return path


@pytest.mark.parametrize("line", lines("console"))
def test_console_examples_run(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    program, *arguments = shlex.split(line, comments=True)
    assert program == "mq-quant"
    code = 0
    try:
        main(arguments)
    except SystemExit as e:
        code = int(e.code or 0)
    stated = EXIT_CODE.search(line)
    assert code == (int(stated[1]) if stated else 0), capsys.readouterr().err
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("line", lines("sh"))
def test_other_examples_name_real_commands_and_options(line: str) -> None:
    program, name, *arguments = shlex.split(line, comments=True)
    assert program == "mq-quant"
    group = typer.main.get_command(app)
    with contextlib.closing(group.make_context("mq-quant", [name])) as context:  # type: ignore[type-var]
        command = group.get_command(context, name)
        assert command is not None, name
        command.make_context(name, arguments, parent=context)


def test_the_table_of_tiers_is_what_the_program_says() -> None:
    for row in tier_table().tiers:
        (stated,) = re.findall(rf"^\| `{row.tier}` \|(.*)\|$", TEXT, re.MULTILINE)
        *_, size, memory = (cell.strip() for cell in stated.split("|"))
        assert size == f"{row.total_bytes / 1e9:.1f} GB"
        assert memory == row.memory


def test_links_lead_somewhere() -> None:
    titles = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target
