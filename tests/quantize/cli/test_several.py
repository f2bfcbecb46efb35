"""Several tiers in one command: which are asked for, what is refused, and what is said of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mq_quant.formats.minimax import parse_config
from mq_quant.quantize.spec.efforts import Share, hours
from mq_quant.quantize.spec.estimates import plan_summary
from mq_quant.quantize.spec.places import choose_recipe, model_files
from mq_quant.quantize.spec.recipe import tiers
from mq_quant.quantize.write.journal import Journal
from mq_quant.quantize.write.partial_file import JOURNAL

Run = Callable[..., tuple[int, str, str]]
TWO = ["--tier", "mq2", "--tier", "mq4"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*TWO, "-o", "file"], "--output names one file: give --output-dir FOLDER"),
        (["--tier", "mq2", "-o", "file", "--output-dir", "."], "--output names one file"),
        (["--all-tiers", "--tier", "mq2"], "--all-tiers names every tier already"),
        (["--all-tiers", "--recipe", "mine.yaml"], "--all-tiers names every tier already"),
        ([*TWO, "--part", "1/2"], "--part, --layers, --ray and budgets make one file: give one --tier"),
        ([*TWO, "--layers", "0-1"], "make one file"),
        ([*TWO, "--ray", "local"], "make one file"),
        (["--size", "12MB", "--output-dir", "."], "make one file"),
        ([*TWO, "--recipe", "mine.yaml"], "give either --tier or --recipe"),
        (["--tier", "mq2", "--tier", "mq2"], "the tier mq2 is given twice"),
        (["--tier", "mq2", "--tier", "mq9"], "mq9"),
        ([*TWO, "--output-dir", "none"], "its folder does not exist"),
    ],
)
def test_what_does_not_go_together_is_refused_before_work(
    arguments: list[str], said: str, mq: Run, small: Path, tmp_path: Path
) -> None:
    code, out, err = mq("build", "--source", small, "--no-imatrix", *arguments)
    assert (code, out) == (2, "")
    assert said in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_json_has_an_entry_for_each_tier(mq: Run, small: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    build = ["build", "--source", small, "--no-imatrix", "--output-dir", "made", "--jobs", 2]
    code, out, _ = mq(*build, "--tier", "mq2", "--json")
    assert code == 0
    held = Journal(tmp_path / "made" / f"small.mq3{JOURNAL}")
    try:
        code, out, err = mq(*build, "--tier", "mq2", "--tier", "mq3", "--tier", "mq4", "--json")
    finally:
        held.close()
    assert code == 2
    rows = json.loads(out)["tiers"]
    assert [(row["tier"], row["state"]) for row in rows] == [
        ("mq2", "finished already"),
        ("mq3", "failed"),
        ("mq4", "made"),
    ]
    assert rows[1]["error"]["code"] == "in_use"
    assert rows[2]["result"]["total_bytes"] == (tmp_path / "made" / "small.mq4").stat().st_size
    assert json.loads(err.splitlines()[-1])["code"] == "in_use"


def test_text_names_each_file_and_what_became_of_it(mq: Run, small: Path, tmp_path: Path) -> None:
    code, out, err = mq("build", "--source", small, "--no-imatrix", *TWO)
    assert code == 0 and err == ""
    assert "mq2   small.mq2" in out and "mq4   small.mq4" in out and out.count("made") == 2
    assert "the engine, for mq4: " in out
    code, out, err = mq("build", "--source", small, "--no-imatrix", *TWO)
    assert code == 0 and out.count("finished already") == 2
    assert "note: mq2 is finished already: small.mq2 stays as it is" in err


def test_a_plan_of_several_tiers_counts_one_download(mq: Run) -> None:
    code, out, _ = mq("plan", "--all-tiers", "--json", "--jobs", 16)
    assert code == 0
    found = json.loads(out)
    single = plan_summary("mq3", None, None, 16)
    assert sorted(row["tier"] for row in found["tiers"]) == tiers()
    assert found["total_bytes"] == sum(row["total_bytes"] for row in found["tiers"])
    assert single.disk_bytes is not None
    assert found["disk_bytes"] - found["total_bytes"] == single.disk_bytes - single.total_bytes
    for several, one in zip(found["efforts"], single.efforts, strict=True):
        assert several["download_bytes"] == one.download_bytes
        assert one.hours < several["hours"] <= 6 * one.hours
    code, out, _ = mq("plan", "--all-tiers")
    assert code == 0 and "6 files, together 568.6 GB" in out and "all of them in one pass" in out


def test_hours_follow_from_what_tiers_have_in_common() -> None:
    config = parse_config(model_files(choose_recipe("mq2", None, None).model).config)

    def of(effort: str, *formats: tuple[str, str]) -> float:
        return hours(config, effort, 65536, 16, share=Share.of([[pair] for pair in formats]))  # type: ignore[arg-type]

    one = of("imatrix", ("2", "4"))
    assert one == hours(config, "imatrix", 65536, 16)
    assert of("imatrix", ("2", "4"), ("2", "3")) == pytest.approx(one * 4 / 3)
    assert of("imatrix", ("2", "4"), ("3", "4")) == pytest.approx(one * 5 / 3)
    pair, twice = of("calibrated", ("2", "4"), ("2", "3")), of("calibrated", ("2", "4"), ("3", "4"))
    assert hours(config, "calibrated", 65536, 16) < pair < twice < 2 * hours(config, "calibrated", 65536, 16)
