"""The command line: one JSON object on stdout, messages on stderr, exit codes, no traceback unless asked for."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from mq_quant.quantize import cli
from mq_quant.quantize.cli.app import app
from mq_quant.quantize.tiny.folder import ensure_tiny

Run = Callable[..., tuple[int, str, str]]


def plain(small: Path) -> list[object]:
    return ["build", "--tier", "mq2", "--source", small, "--no-imatrix"]


def test_build_prints_one_object_with_what_was_promised(mq: Run, small: Path, tmp_path: Path) -> None:
    code, out, err = mq(*plain(small), "--json", "--jobs", 2)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert set(result) >= {
        "path", "total_bytes", "tensor_count", "quantization_hash", "seconds", "weights_per_second",
        "peak_rss_bytes", "coverage", "fallbacks",
    }  # fmt: skip
    assert (tmp_path / "small.mq2").stat().st_size == result["total_bytes"]


def test_quiet_prints_nothing(mq: Run, small: Path) -> None:
    assert mq(*plain(small), "--quiet") == (0, "", "")


def test_text_is_for_people(mq: Run, small: Path) -> None:
    code, out, err = mq(*plain(small), "-o", "x.mq2")
    assert code == 0
    assert out.startswith("x.mq2: ")
    assert "quantization hash" in out
    assert err == ""


def test_plan_keeps_its_promise_without_a_checkpoint(mq: Run, small: Path, tmp_path: Path) -> None:
    code, out, _ = mq("plan", "--tier", "mq2-lloyd", "--json")
    result = json.loads(out)
    assert code == 0
    assert set(result) >= {
        "tier", "total_bytes", "payload_bytes", "metadata_bytes", "tensor_count", "by_format", "peak_memory_bytes",
    }  # fmt: skip
    assert round(result["total_bytes"] / 1e9, 1) == 86.2
    alone = tmp_path / "config.json"
    alone.write_text((small / "config.json").read_text())
    assert mq("plan", "--tier", "mq3", "--source", alone)[0] == 0
    assert mq("plan", "--tier", "mq3", "--source", small)[0] == 0


def test_the_plan_of_a_checkpoint_is_the_size_of_its_file(mq: Run, small: Path, tmp_path: Path) -> None:
    planned = json.loads(mq("plan", "--tier", "mq2", "--source", small, "--json")[1])
    given = ("--imatrix", small / "imatrix.gguf", "--awq-alpha", "0.3")
    built = json.loads(mq("build", "--tier", "mq2", "--source", small, *given, "--json")[1])
    assert built["tensor_count"] == planned["tensor_count"]
    assert abs(built["total_bytes"] - planned["total_bytes"]) <= 4096


def test_a_plan_without_a_tier_is_of_all(mq: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = mq("plan")
    assert code == 0 and max(map(len, out.splitlines())) <= 100
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("mq")}
    assert rows["mq4"][:5] == ["123.6", "GB", "128", "GB", "no"] or rows["mq4"][4] == "yes"
    assert list(rows) == ["mq4", "mq3-lloyd", "mq3", "mq2-lloyd", "mq2", "mq2-mini"]
    assert "calibrated" in out and "5.1 h at 100 Mbit/s" in out
    result = json.loads(mq("plan", "--json", "--jobs", "2")[1])
    assert result["jobs"] == 2 and len(result["tiers"]) == 9 and result["streamed_bytes"] > 0
    of_tiny = json.loads(mq("plan", "--source", "tiny", "--json")[1])
    assert of_tiny["streamed_bytes"] == 0 and of_tiny["efforts"][0]["download_bytes"] is None


def test_tiers_lists_all_six_with_their_memory(mq: Run, small: Path) -> None:
    code, out, _ = mq("tiers", "--source", small)
    assert code == 0
    for tier in ("mq4", "mq3-lloyd", "mq3", "mq2-lloyd", "mq2", "mq2-mini"):
        assert f"\n{tier} " in out
    assert "fits in" in out


def test_inspect_diff_reproduce_agree_with_build(mq: Run, small: Path) -> None:
    built = json.loads(mq(*plain(small), "-o", "a", "--json")[1])
    shown = json.loads(mq("inspect", "a", "--json")[1])
    assert shown["metadata"]["quantization_hash"] == built["quantization_hash"]
    assert len(shown["tensors"]) == built["tensor_count"]
    assert "no tensor matches" in mq("inspect", "a", "--filter", "nothing")[1]
    assert "lm_head.weight  Q8F16" in mq("inspect", "a", "--filter", "lm_head")[1]
    assert "group 0:" in mq("inspect", "a", "--tensor", "lm_head.weight")[1]
    assert json.loads(mq("inspect", "a", "--provenance")[1])["imatrix"] is None
    assert mq("diff", "a", "a")[0] == 0
    mq("build", "--tier", "mq3", "--source", small, "--no-imatrix", "-o", "b", "-q")
    code, out, _ = mq("diff", "a", "b")
    assert code == 1
    assert re.search(r"experts\.w1 +MQ2-Lloyd +MQ3-Lloyd +6 ", out)
    assert len(out.splitlines()) <= 24
    whole = mq("diff", "a", "b", "--all")[1]
    assert whole.count("experts.0.w1.weight") == 2
    assert json.loads(mq("diff", "a", "b", "--json")[1])["identical"] is False
    code, out, _ = mq("reproduce", "a", "--source", small)
    assert code == 0
    assert "come out the same" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build",), "give either --tier or --recipe"),
        (("build", "--tier", "mq9"), "no tier 'mq9'"),
        (("build", "--tier", "mq2", "--source", "nowhere"), "no such folder: nowhere"),
        (("build", "--tier", "mq2", "--source", "tinny"), "did you mean 'tiny'?"),
        (("build", "--tier", "mq2", "--fit", "best"), "--fit"),
        (("build", "--tier", "mq2", "--jobs", "0"), "--jobs"),
        (("build", "--recipe", "none.yaml"), "none.yaml: cannot be read"),
        (("plan", "--tier", "mq2", "--recipe", "x.yaml"), "give either --tier or --recipe"),
        (("inspect", "none.mq2"), "none.mq2: cannot be opened"),
        (("inspect",), "Missing argument"),
        (("diff", "a", "b"), "a: cannot be opened"),
        (("reproduce", "none"), "none: cannot be opened"),
        (("fly",), "No such command"),
    ],
)
def test_bad_input_is_exit_code_2_with_a_message_and_no_traceback(
    mq: Run, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = mq(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_an_output_that_cannot_be_is_refused(mq: Run, small: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "is a folder" in mq(*plain(small), "-o", tmp_path / "folder")[2]
    assert "its folder does not exist" in mq(*plain(small), "-o", tmp_path / "none" / "x")[2]
    (tmp_path / "x").touch()
    code, _, err = mq(*plain(small), "-o", tmp_path / "x")
    assert code == 2
    assert "--force" in err


def test_force_does_not_replace_what_the_file_is_made_from(mq: Run, small: Path, tmp_path: Path) -> None:
    source = shutil.copytree(small, tmp_path / "source")
    shard, recipe = next(source.glob("*.safetensors")), tmp_path / "mine.yaml"
    recipe.write_text("schema: 1\n")
    for path, arguments in (
        (shard, plain(source)),
        (source / "config.json", plain(source)),
        (recipe, ("build", "--recipe", recipe, "--source", source)),
    ):
        before = path.read_bytes()
        code, _, err = mq(*arguments, "-o", path, "--force")
        assert code == 2 and "is an input of this command" in err
        assert path.read_bytes() == before


def test_debug_shows_the_traceback(mq: Run) -> None:
    from mq_quant.formats.errors import HfqError

    with pytest.raises(HfqError):
        mq("inspect", "none", "--debug")


def test_every_command_of_every_module_is_there() -> None:
    modules = [import_module(f"{cli.__name__}.{found.name}") for found in pkgutil.iter_modules(cli.__path__)]
    names = [name for module in modules for name in getattr(module, "COMMANDS", ())]
    assert sorted(names) == sorted(str(command.name) for command in app.registered_commands)


def test_the_summary_of_a_command_is_a_whole_sentence(mq: Run) -> None:
    lines = mq("--help")[1].partition("Commands:")[2].split("\n")
    assert all(line.endswith(".") and not line.endswith("...") for line in lines if line.strip())


def test_every_command_has_help_with_examples(mq: Run) -> None:
    for command in app.registered_commands:
        code, out, _ = mq(command.name, "--help")
        assert code == 0
        assert f"mq-quant {command.name}" in out.partition("Examples:")[2], command.name


LISTED = """
import sys
from mq_quant.quantize.cli.app import main
try: main(sys.argv[1:])
except SystemExit as e: code = e.code
print(code or 0, *sorted(set(sys.modules)), file=sys.stderr)
"""


def loaded(*arguments: str) -> tuple[str, set[str]]:
    """What a command prints, and the packages that a process of its own has loaded when it ends well."""
    command = [sys.executable, "-c", LISTED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, *modules = done.stderr.split()
    assert code == "0"
    return done.stdout, {name.partition(".")[0] for name in modules}


ALL_HEAVY = {
    "numpy", "torch", "numba", "scipy", "pydantic", "yaml", "huggingface_hub", "sklearn", "gguf", "tqdm", "safetensors",
    "tokenizers", "jinja2", "rich", "matplotlib", "xxhash", "threadpoolctl",
}  # fmt: skip
"""What takes time to import."""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in ("build", "verify"))]
)
def test_help_and_version_load_nothing_heavy(arguments: list[str]) -> None:
    out, packages = loaded(*arguments)
    assert "mq-quant" in out
    assert packages & ALL_HEAVY <= {"pydantic"}, "which typer may use to read a command's options"


@pytest.mark.parametrize(
    "arguments", [["tiers"], ["plan", "--tier", "mq2"], ["plan", "--tier", "mq2", "--source", "tiny"]]
)
def test_sizes_need_recipes_and_arithmetic_only(arguments: list[str]) -> None:
    """numpy states the formats, pydantic and yaml read recipes, xxhash makes a checksum of the metadata."""
    ensure_tiny()
    out, packages = loaded(*arguments)
    assert "mq2" in out
    assert packages & ALL_HEAVY <= {"numpy", "pydantic", "yaml", "xxhash"}


def test_the_installed_command_runs(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("mq-quant")
    done: Any = subprocess.run(
        [command, "--version"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.startswith("mq-quant ")


def test_a_shell_completes_commands_and_tiers(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("mq-quant")

    def completed(line: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        env = {**os.environ, **words, "_MQ_QUANT_COMPLETE": "complete_bash"}
        done = subprocess.run([command], capture_output=True, text=True, env=env, cwd=tmp_path)
        return done.stdout.split()

    assert {"reproduce", "recipes"} <= set(completed("mq-quant re"))
    assert completed("mq-quant plan --tier mq2") == ["mq2", "mq2-lloyd", "mq2-mini"]
