"""The wheel: everything that is needed is in it, and it runs from an environment that holds no checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("formats", "awq", "lloyd", "kernels", "verify", "quantize", "recipes", "texts")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "__init__.py", "py.typed"):
        shutil.copy(ROOT / name, tree / name)
    for room in ROOMS:
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_it_holds_every_source_recipe_and_kernel(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            if (
                path.suffix
                in (".py", ".yaml", ".hip", ".h", ".typed", ".cpp", ".inc", ".xz", ".jinja", ".toml")
                and path.is_file()
            ):
                assert f"mq_quant/{path.relative_to(ROOT)}" in held
    for name in ("LICENSE", "NOTICE"):
        assert any(entry.endswith(f"licenses/{name}") for entry in held)


def test_it_holds_the_licences_of_the_texts(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    licences = list((ROOT / "texts" / "licences").iterdir())
    assert licences
    for path in licences:
        assert f"mq_quant/{path.relative_to(ROOT)}" in held
    assert "mq_quant/texts/SOURCES.md" in held


def test_it_runs_from_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    python = env / "bin" / "python"
    pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "--no-deps", "--quiet", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    own = next((env / "lib").glob("python*/site-packages"))
    (own / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    script = "import mq_quant; print(mq_quant.__file__)"
    where = subprocess.run(
        [python, "-c", script], check=True, capture_output=True, text=True, env=clean, cwd=tmp_path
    )
    assert where.stdout.startswith(str(own))
    listed = subprocess.run(
        [env / "bin" / "mq-quant", "tiers", "--json"],
        check=True,
        capture_output=True,
        text=True,
        env=clean,
        cwd=tmp_path,
    )
    sizes = {row["tier"]: round(row["total_bytes"] / 1e9, 1) for row in json.loads(listed.stdout)["tiers"]}
    assert sizes == {
        "mq4": 123.6, "mq3-lloyd": 109.6, "mq3": 102.6, "mq2-lloyd": 86.2, "mq2": 79.2, "mq2-mini": 67.5,
        "fit-128": 124.3, "fit-96": 92.2, "fit-80": 76.1,
    }  # fmt: skip
