"""The HTML report: self-contained, escaped, and used as a reader does, in a browser without a window."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, opened
from mq_quant.verify.bars import Bars
from mq_quant.verify.facts import FileFacts
from mq_quant.verify.model.metrics import DivergenceSummary, LayerFigures
from mq_quant.verify.report import render
from mq_quant.verify.run import Verification
from mq_quant.verify.stages.fidelity import FidelityFigures, ProjectionFidelity
from mq_quant.verify.stages.forward_parity import ForwardFigures
from mq_quant.verify.stages.generation import Coherence, Continuation
from mq_quant.verify.stages.predictions import PredictionFigures
from mq_quant.verify.stages.stage import Figures, StageResult

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
    rows = tuple(
        ProjectionFidelity(r.layer, r.projection, "Q8F16", 4, 48.0, 47.0, 1.0, 46.0, r.worst)
        if r.projection == "self_attn.q_proj"
        else r
        for r in rows
    )
    divergence = DivergenceSummary(
        300, 0.01, 0.001, 0.008, 0.03, 0.05, 0.08, 0.09, 0.95, 0.9, 10.0, 0.1, math.nan, math.nan
    )
    kld = tuple(rng.lognormal(-5, 1, 300).tolist())
    figures: dict[str, Figures | None] = {
        "structure": None,
        "fidelity": FidelityFigures(True, rows),
        "forward": ForwardFigures(64, "cpu", "CPU", layers, divergence, 1, 1, 1.0),
        "predictions": PredictionFigures(300, layers, divergence, kld, 1.0),
        "generation": Continuation((1,), (2,), EVIL, EVIL, False, Coherence(1)),
    }
    problems = () if ok else (f"{EVIL}: is wrong",) * 49
    stages = tuple(
        StageResult(name, 5, "things", problems, (EVIL,), None if broken else found)
        for name, found in figures.items()
    )
    seconds = dict.fromkeys(figures, 1.25)
    recipe = {"tier": EVIL, "rules": [{"tensors": EVIL, "format": "MQ4"}]}
    hashes = {f"model-{i:05d}-of-00125.safetensors": "ab" * 32 for i in range(125)}
    facts = FileFacts(
        86_200_000_000, 48_000, EVIL, EVIL, "mq-quant 0.1.0", recipe, {"repository": EVIL, "revision": "f" * 40},
        hashes, "cd" * 32, None, 65536, "0123456789abcdef", None,
    )  # fmt: skip
    bars = Bars(kld_mean=0.02, top1=0.9, cosine_min=0.9, coherence=True)
    return Verification(Path(f"{EVIL}.mq2"), stages, {"decode": EVIL}, seconds, 1, facts, bars)


@pytest.mark.parametrize("ok", [True, False])
def test_is_self_contained_and_escaped(ok: bool) -> None:
    page = render(verification(ok))
    assert page.count("<script") == 1 and "&lt;script&gt;" in page
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


def test_says_what_the_file_is_and_what_it_was_held_to() -> None:
    page = re.sub(r"<(style|svg).*?</\1>", "", render(verification()), flags=re.DOTALL)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    rows = list(zip(cells, cells[1:], cells[2:], strict=False))
    for expected in (("size", "86,200,000,000 bytes in 48,000 tensors"), ("made by", "mq-quant 0.1.0")):
        assert expected in [row[:2] for row in rows]
    assert ("mean KL divergence", "at most 0.02", "0.01") in rows
    assert ("cosine at any position", "at least 0.9", f"{1 - 1e-3 * 62:.6g}") in rows
    assert "0123456789abcdef" in page and "cd" * 32 in page and "on 65,536 tokens" in page
    assert page.count("ab" * 32) == 125


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(verification()), encoding="utf-8")
    return path


@needs_browser
def test_a_reader_can_use_it_without_a_network_or_a_mouse(written: Path, tmp_path: Path) -> None:
    """No word in the console, no request but for the page itself; Tab reaches all, Enter sorts."""
    reachable = "[...document.querySelectorAll('button, summary, .wide')].filter(e => e.checkVisibility())"
    with opened(written, tmp_path / "profile") as page:
        page.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
        wanted = page.ask(f"{reachable}.length")
        assert wanted > 25
        page.ask("window.seen = new Set()")
        for _ in range(wanted):
            page.press("Tab", 9)
            page.ask("seen.add(document.activeElement)")
        assert page.ask(f"{reachable}.every(e => seen.has(e))")

        find = "[...document.querySelectorAll('table')].find(t => t.caption.textContent == 'Layers against the source')"
        first = f"{find}.tBodies[0].rows[0].cells[0].textContent"
        page.ask(f"{find}.querySelector('th button').focus()")
        page.press("Enter", 13)
        assert (page.ask(first), page.ask(f"{find}.querySelector('th').ariaSort")) == ("0", "ascending")
        page.press("Enter", 13)
        assert (page.ask(first), page.ask(f"{find}.querySelector('th').ariaSort")) == ("61", "descending")
        page.ask(f"{find}.querySelectorAll('th button')[3].click()")
        assert page.ask(first) == "0" and page.ask(f"{find}.querySelectorAll('[aria-sort]').length") == 1

        assert page.said == []
        assert [url for url in page.asked if not url.startswith("data:")] == [written.as_uri()]


@needs_browser
def test_a_browser_draws_every_plot(written: Path, tmp_path: Path) -> None:
    """In both modes of colour: the lines' blue and orange, and the heat map's ends, which are spent on experts."""
    from matplotlib.image import imread

    with opened(written, tmp_path / "profile") as page:
        for mode in ("light", "dark"):
            if mode == "dark":
                page.dark()
            page.screenshot(tmp_path / f"{mode}.png")
    for mode, ground in (("light", (255, 255, 255)), ("dark", (0x0D, 0x11, 0x17))):
        pixels = (imread(tmp_path / f"{mode}.png")[:, :, :3] * 255).round().astype(int)
        assert tuple(pixels[5, 5]) == ground

        def rows_with(color: tuple[int, int, int], least: int, pixels: np.ndarray = pixels) -> np.ndarray:
            near = (np.abs(pixels - color).max(axis=2) <= 3).sum(axis=1)
            return np.flatnonzero(near >= least)

        blue, orange = rows_with((0x35, 0x78, 0xBD), 1), rows_with((0xC2, 0x57, 0x1A), 1)
        dark, bright = rows_with((68, 1, 84), 3), rows_with((253, 231, 37), 3)
        assert min(map(len, (blue, orange, dark, bright))) > 5, mode
        assert rows_with((0x35, 0x78, 0xBD), 100).size, "the histogram's bars"
        assert blue.min() < orange.max() < bright.max()
