"""The HTML report: self-contained, escaped, and with plots that a browser really draws."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mq_quant.verify.report import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<script>alert(1)</script>"


def verdict(ok: bool = True) -> dict[str, Any]:
    def stage(name: str, **values: Any) -> dict[str, Any]:
        common = {"ok": ok, "seen": 5, "unit": "things", "seconds": 1.25, "notes": [EVIL]}
        problems = [] if ok else [f"{EVIL}: is wrong"]
        return {"stage": name, **common, "problems": problems, "problem_count": 30 * len(problems), **values}

    rng = np.random.default_rng(0)
    layers = [
        {"layer": i, "cosine_mean": 1 - 1e-4 * (i + 1), "cosine_min": 1 - 1e-3 * (i + 1), "routing": 1.0}
        for i in range(62)
    ]
    rows = [
        {
            "layer": i,
            "projection": p,
            "format": "MQ4",
            "tensors": 4,
            "snr_db": 20.0,
            "output_snr_db": 18 + i / 10,
            "slope": 1.0,
            "worst_db": 17.0,
            "worst": f"model.layers.{i}.{p}.weight",
        }
        for i in range(62)
        for p in ("w1", "w2", "w3", "self_attn.q_proj")
    ]
    forward = {
        "device": "CPU",
        "positions": 300,
        "layers": layers,
        "kld": rng.lognormal(-5, 1, 300).tolist(),
        "kld_mean": 0.01,
        "kld_median": 0.008,
        "kld_p99": 0.05,
        "kld_max": 0.09,
        "top1": 0.95,
        "ppl_reference": 10.0,
        "ppl_test": None,
    }
    stages = [
        stage("structure"),
        stage("fidelity", rows=rows, weighted=True),
        stage("forward", **forward),
        stage("generation", prompt=EVIL, text=EVIL),
    ]
    return {"path": f"{EVIL}.mq2", "ok": ok, "stages": stages, "skipped": {"decode": EVIL}}


@pytest.mark.parametrize("ok", [True, False])
def test_is_self_contained_and_escaped(ok: bool) -> None:
    page = render(verdict(ok))
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="?(https?:)?//', page)
    assert ("passed" in page) is ok and ("and 29 more" in page) is not ok
    seen: list[str] = []

    class Ids(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.extend(value or "" for key, value in attrs if key == "id" and tag == "figure")

    Ids().feed(page)
    assert seen == ["cosine", "kld", "snr"]


def test_is_the_same_for_the_same_verdict() -> None:
    assert render(verdict()) == render(verdict())


def test_a_stage_that_could_not_run_has_no_plots() -> None:
    broken = verdict(False)
    broken["stages"] = [
        {k: v for k, v in stage.items() if k not in ("layers", "rows", "text")} for stage in broken["stages"]
    ]
    assert "<figure" not in render(broken)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_draws_every_plot(tmp_path: Path) -> None:
    """A screenshot holds the plots' own colours: the bars' and lines' blue, their orange, and the heat map's ends."""
    from matplotlib.image import imread

    assert CHROMIUM is not None
    (tmp_path / "report.html").write_text(render(verdict()), encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1100,2400",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'shot.png'}"]
    subprocess.run(
        [*command, (tmp_path / "report.html").as_uri()], check=True, capture_output=True, timeout=120
    )
    pixels = (imread(tmp_path / "shot.png")[:, :, :3] * 255).round().astype(int)

    def rows_with(color: tuple[int, int, int], least: int) -> np.ndarray:
        near = (np.abs(pixels - color).max(axis=2) <= 3).sum(axis=1)
        return np.flatnonzero(near >= least)

    blue, orange = rows_with((0x25, 0x63, 0xA8), 1), rows_with((0xC2, 0x57, 0x1A), 1)
    dark, bright = rows_with((68, 1, 84), 3), rows_with((253, 231, 37), 3)
    assert min(map(len, (blue, orange, dark, bright))) > 5
    assert rows_with((0x25, 0x63, 0xA8), 100).size, "the histogram's bars"
    assert blue.min() < orange.max() < bright.max()
