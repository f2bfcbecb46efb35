"""Workflows: their lines are commands of ours with real options, and nothing from outside reaches a shell line."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from mq_quant.quantize.cli.app import app

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(path: Path) -> list[dict[str, Any]]:
    document = yaml.safe_load(path.read_text())
    return [step for job in document["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_read_only_and_ends_by_itself(path: Path) -> None:
    document = yaml.safe_load(path.read_text())
    assert document["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] <= 360 for job in document["jobs"].values())
    for step in steps(path):
        assert "${{" not in step.get("run", ""), "a value from outside would be run by the shell"


def test_what_is_regenerated_are_commands_of_ours() -> None:
    lines = [
        step["run"] for step in steps(ROOT / ".github" / "workflows" / "regenerate.yml") if "run" in step
    ]
    ours = [re.sub(r" > .*", "", line) for line in lines if "mq-quant" in line]
    assert len(ours) == 1
    _, name, *arguments = shlex.split(ours[0])
    group = typer.main.get_command(app)
    with contextlib.closing(group.make_context("mq-quant", [name])) as context:  # type: ignore[type-var]
        command = group.get_command(context, name)
        assert command is not None
        command.make_context(name, arguments, parent=context)


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is not installed")
def test_actionlint_finds_nothing() -> None:
    done = subprocess.run(["actionlint", *map(str, WORKFLOWS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
