"""Every example of the README and of docs/: console blocks are run in order, others are parsed against the options."""

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
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXIT_CODE = re.compile(r"# exit code (\d)")


def lines(kind: str) -> list[tuple[str, str]]:
    """(page, command) of every example in blocks of that kind, in order."""
    return [
        (page, line.removeprefix("$ "))
        for page, text in PAGES.items()
        for name, block in BLOCK.findall(text)
        if name == kind
        for line in block.splitlines()
        if line.startswith("$ ")
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each page, with the recipes that the page shows."""
    made = {}
    for page, text in PAGES.items():
        made[page] = tmp_path_factory.mktemp("examples")
        for kind, block in BLOCK.findall(text):
            if kind == "yaml" and (name := re.match(r"# ([\w.-]+\.yaml)\n", block)):
                (made[page] / name[1]).write_text(block)
    return made


@pytest.mark.parametrize(("page", "line"), lines("console"))
def test_console_examples_run(
    page: str,
    line: str,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folders[page])
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


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != "README.md" and "```python" in PAGES[page]]
)
def test_python_examples_run(page: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a page's in one session, as they are read; that of the README is run with the module's."""
    monkeypatch.chdir(folders[page])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, object] = {}
    for kind, block in BLOCK.findall(PAGES[page]):
        if kind == "python":
            if "ray=" in block:
                pytest.importorskip("ray", reason="Ray is not installed")
            exec(block, names)


@pytest.mark.parametrize(("page", "line"), lines("sh"))
def test_other_examples_name_real_commands_and_options(page: str, line: str) -> None:
    program, name, *arguments = shlex.split(line, comments=True)
    assert program == "mq-quant"
    group = typer.main.get_command(app)
    with contextlib.closing(group.make_context("mq-quant", [name])) as context:  # type: ignore[type-var]
        command = group.get_command(context, name)
        assert command is not None, name
        command.make_context(name, arguments, parent=context)


def test_the_table_of_commands_names_every_command() -> None:
    listed = re.findall(r"^\| `([\w-]+)` \| [a-z].*\|$", PAGES["README.md"], re.MULTILINE)
    assert sorted(name for name in listed if not name.startswith("mq")) == sorted(
        typer.main.get_command(app).commands
    )  # type: ignore[attr-defined]


def test_the_table_of_tiers_is_what_the_program_says() -> None:
    for row in tier_table().tiers:
        (stated,) = re.findall(rf"^\| `{row.tier}` \|(.*)\|$", PAGES["README.md"], re.MULTILINE)
        *_, size, memory = (cell.strip() for cell in stated.split("|"))
        assert size == f"{row.total_bytes / 1e9:.1f} GB"
        assert memory == row.memory


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    titles = re.findall(r"^#+ (.*)$", PAGES[page], re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            name, _, heading = target.partition("#")
            path = (ROOT / page).parent / name
            assert path.exists(), target
            assert not heading or f"# {heading.replace('-', ' ')}" in path.read_text().lower(), target
