"""The HTML report: self-contained, escaped, and with plots that a browser really draws."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from mq_quant.verify.model.metrics import DivergenceSummary, LayerFigures
from mq_quant.verify.report import render
from mq_quant.verify.run import Verification
from mq_quant.verify.stages.fidelity import FidelityFigures, ProjectionFidelity
from mq_quant.verify.stages.forward_parity import ForwardFigures
from mq_quant.verify.stages.generation import Coherence, Continuation
from mq_quant.verify.stages.stage import Figures, StageResult

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<script>alert(1)</script>"


def verification(ok: bool = True, broken: bool = False) -> Verification:
    """Every text is hostile; stages that broke off have no figures."""
    rng = np.random.default_rng(0)
    layers = tuple(
        LayerFigures(i, 1 - 1e-4 * (i + 1), 1 - 1e-3 * (i + 1), 2e-4 * (i + 1), 1.0) for i in range(62)
    )
    rows = tuple(
        ProjectionFidelity(i, p, "MQ4", 4, 20.0, 18 + i / 10, 1.0, 17.0, f"model.layers.{i}.{p}.weight")
        for i in range(62)
        for p in ("w1", "w2", "w3", "self_attn.q_proj")
    )
    divergence = DivergenceSummary(
        300, 0.01, 0.001, 0.008, 0.03, 0.05, 0.08, 0.09, 0.95, 0.9, 10.0, 0.1, math.nan, math.nan
    )
    kld = tuple(rng.lognormal(-5, 1, 300).tolist())
    figures: dict[str, Figures | None] = {
        "structure": None,
        "fidelity": FidelityFigures(True, rows),
        "forward": ForwardFigures(300, "cpu", "CPU", layers, divergence, kld, 1, 1, 1.0),
        "generation": Continuation((1,), (2,), EVIL, EVIL, False, Coherence(1)),
    }
    problems = () if ok else (f"{EVIL}: is wrong",) * 49
    stages = tuple(
        StageResult(name, 5, "things", problems, (EVIL,), None if broken else found)
        for name, found in figures.items()
    )
    seconds = dict.fromkeys(figures, 1.25)
    return Verification(Path(f"{EVIL}.mq2"), stages, {"decode": EVIL}, seconds, 1)


@pytest.mark.parametrize("ok", [True, False])
def test_is_self_contained_and_escaped(ok: bool) -> None:
    page = render(verification(ok))
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="?(https?:)?//', page)
    assert ("passed" in page) is ok and ("and 29 more" in page) is not ok
    seen: list[str] = []

    class Ids(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.extend(value or "" for key, value in attrs if key == "id" and tag == "figure")

    Ids().feed(page)
    assert seen == ["cosine", "kld", "snr"]


def test_is_the_same_for_the_same_verification() -> None:
    assert render(verification()) == render(verification())


def test_a_stage_that_could_not_run_has_no_plots() -> None:
    assert "<figure" not in render(verification(False, broken=True))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_draws_every_plot(tmp_path: Path) -> None:
    """A screenshot holds the plots' own colours: the bars' and lines' blue, their orange, and the heat map's ends."""
    from matplotlib.image import imread

    assert CHROMIUM is not None
    (tmp_path / "report.html").write_text(render(verification()), encoding="utf-8")
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
