"""Budgets on the command line: finished files keep them, and what contradicts them is refused before any work."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.minimax import PROJECTIONS, expert_name
from mq_quant.quantize.cli.app import main
from mq_quant.quantize.spec.estimates import plan_summary
from mq_quant.quantize.spec.recipe import load_recipe

Printed = pytest.CaptureFixture[str]


def run(capsys: Printed, *line: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command."""
    code = 0
    try:
        main([str(word) for word in line])
    except SystemExit as e:
        code = int(e.code or 0)
    return code, *capsys.readouterr()


def build(capsys: Printed, small: Path, out: Path, size: int, *more: object) -> tuple[int, str, str]:
    settings = ("--imatrix", small / "imatrix.gguf", "--awq-alpha", "0.3", "--device", "cpu", "--json")
    return run(capsys, "build", "--source", small, "-o", out, "--size", f"{size}B", *settings, *more)


def test_a_file_has_mixed_formats_and_at_most_the_bytes_that_were_asked_for(
    small: Path, tmp_path: Path, capsys: Printed
) -> None:
    out, recipe = tmp_path / "out", tmp_path / "mine.yaml"
    code, printed, said = build(capsys, small, out, 1_200_000, "--write-recipe", recipe)
    assert code == 0, said
    assert json.loads(printed)["total_bytes"] == out.stat().st_size <= 1_200_000
    assert "typical of two small models" in said
    with open_hfq(out) as file:
        formats = {e.name: e.quant_type for e in file.entries}
    of = [[formats[expert_name(layer, 0, p)] for p in PROJECTIONS] for layer in range(2)]
    assert all(w1 == w3 for w1, _, w3 in of)
    assert of[0] != of[1]
    written = load_recipe(recipe)
    assert written.tier == "size-1200000b"
    again = tmp_path / "again"
    own = ("--imatrix", small / "imatrix.gguf", "--awq-alpha", "0.3", "--device", "cpu", "--quiet")
    assert run(capsys, "build", "--recipe", recipe, "-o", again, *own)[0] == 0
    assert again.read_bytes() == out.read_bytes()


def test_a_budget_between_the_planned_and_the_finished_size_of_the_smallest_tier_is_refused(
    small: Path, tmp_path: Path, capsys: Printed
) -> None:
    """`plan` counts no provenance: the tier's file is larger by a page, and no file stands that breaks the budget."""
    planned = plan_summary("mq2-mini", None, str(small), 1).total_bytes
    code, _, said = build(capsys, small, tmp_path / "out", planned)
    if code:
        assert "smaller than the smallest" in said and not (tmp_path / "out").exists()
        assert not list(tmp_path.glob("*partial*"))
    else:
        assert (tmp_path / "out").stat().st_size <= planned
    larger = planned + 16384
    assert build(capsys, small, tmp_path / "more", larger)[0] == 0
    assert (tmp_path / "more").stat().st_size <= larger


def test_a_measurement_of_other_weights_is_refused_before_any_work(
    small: Path, tmp_path: Path, capsys: Printed
) -> None:
    from measurement_document import document

    model = {**document()["model"], "layers": 2, "hidden": 256, "intermediate": 256, "experts": 3}
    model["files"] = {"model-00001-of-00002.safetensors": "2" * 64}
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(document(model=model, effort="imatrix")))
    code, _, said = build(capsys, small, tmp_path / "out", 1_200_000, "--measurement", path)
    assert code == 2 and "is of another model" in said and "model-00001-of-00002.safetensors" in said
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*partial*"))


@pytest.fixture
def measurement(small: Path, tmp_path: Path) -> Path:
    """Of the small checkpoint under its imatrix, on few tokens."""
    from measurement_document import document

    model = {
        **document()["model"],
        "layers": 2,
        "hidden": 256,
        "intermediate": 256,
        "experts": 3,
        "origin": {},
    }
    files = small.glob("*.safetensors")
    model["files"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    path = tmp_path / "measured.json"
    text = {"tokens": 511, "sha256": "3" * 64}
    path.write_text(json.dumps(document(model=model, effort="imatrix", imatrix="4" * 64, text=text)))
    return path


def test_a_build_is_of_the_effort_that_was_measured(
    small: Path, measurement: Path, tmp_path: Path, capsys: Printed
) -> None:
    """That of the measurement is the default; what is otherwise and lets the choice stand is said."""
    code, _, said = build(capsys, small, tmp_path / "out", 1_100_000, "--measurement", measurement)
    assert code == 0, said
    assert "on 511 tokens only" in said and "under another imatrix" in said and "expected KLD" in said
    with open_hfq(tmp_path / "out") as file:
        assert file.metadata["mq_quant"]["recipe"]["effort"] == "imatrix"


@pytest.mark.parametrize(
    ("options", "of"),
    [
        (("--effort", "calibrated"), "a build of effort calibrated"),
        (("--effort", "tuned"), "a build of effort tuned"),
        (("--no-imatrix",), "a build without importances"),
    ],
)
def test_a_measurement_of_another_effort_is_refused_before_any_work(
    options: tuple[str, ...], of: str, small: Path, measurement: Path, tmp_path: Path, capsys: Printed
) -> None:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 300, (2, 16)))
    tokens = () if "--no-imatrix" in options else ("--tokens", tmp_path / "tokens.npy")
    line = ("--source", small, "-o", tmp_path / "out", "--size", "1100000B", "--measurement", measurement)
    code, printed, said = run(capsys, "build", *line, *options, *tokens, "--device", "cpu", "--quiet")
    assert code == 2 and not printed
    assert "is of effort imatrix" in said and of in said and "--effort imatrix" in said
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*partial*"))


def test_a_plan_has_the_effort_that_was_measured(
    small: Path, measurement: Path, tmp_path: Path, capsys: Printed
) -> None:
    recipe = tmp_path / "mine.yaml"
    line = ("plan", "--source", small, "--size", "1100000B", "--measurement", measurement)
    code, printed, said = run(capsys, *line, "--write-recipe", recipe, "--json")
    assert code == 0, said
    planned = json.loads(printed)
    assert [effort["effort"] for effort in planned["efforts"] if effort["default"]] == ["imatrix"]
    assert "511 tokens only" in planned["fit"]["notes"][0]
    assert load_recipe(recipe).effort == "imatrix"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("build --memory 96GB --tier mq2", "chooses the formats that --tier and --recipe name"),
        ("plan --memory 96GB --recipe mine.yaml", "chooses the formats that --tier and --recipe name"),
        ("build --size 85GB --bits 3", "--size and --bits all say how large the file may be"),
        ("build --tier mq2 --measurement m.json", "go with a budget"),
        ("plan --avoid MQ4", "go with a budget"),
        ("plan --tier mq2 --write-recipe mine.yaml", "go with a budget"),
        ("plan --tier mq2 --context 4096", "--context goes with --memory"),
        ("plan --size 85", "it has no unit"),
        ("plan --size=", "--size is empty"),
        ("plan --memory=", "--memory is empty"),
        ("plan --bits 0", "is no number of bits"),
        ("build --bits 0 --tier mq2", "is no number of bits"),
        ("plan --context 0", "--context goes with --memory"),
        ("plan --memory 3GB", "is taken by the engine alone"),
        ("plan --memory 96GB --context 99999", "more than the 12288 tokens"),
        ("plan --memory 64GB", "files have"),
        ("plan --size 85GB --avoid MQ9", "names no format that experts can have"),
        ("plan --size 85GB --measurement no/such/file.json", "cannot be read"),
    ],
)
def test_contradictions_are_refused(line: str, named: str, capsys: Printed) -> None:
    code, printed, said = run(capsys, *line.split())
    assert code == 2 and not printed
    assert named in said
