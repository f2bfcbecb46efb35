"""Pictures: readable on white and on dark pages, the same for the same figures, and not led by names."""

from __future__ import annotations

import io
import math
import re

import numpy as np
import pytest
from mq_quant.verify import pictures
from mq_quant.verify.model.metrics import LayerFigures
from mq_quant.verify.pictures import BLUE, GREEN, INK, ORANGE, Curve, Measured

FILES = [Measured("a.mq4", 10**9, 0.01, 0.001, 4096), Measured("b.mq2", 5 * 10**8, 0.1, math.nan, 65536)]


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("ink", [INK, BLUE, ORANGE, GREEN])
@pytest.mark.parametrize("ground", ["#ffffff", "#0d1117"])
def test_every_ink_can_be_read_on_both_grounds(ink: str, ground: str) -> None:
    """By the contrast of WCAG, which asks 3 of lines and large text."""
    bright, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
    assert (bright + 0.05) / (dark + 0.05) >= 3.9


def test_the_ground_is_transparent_and_only_our_inks_are_used() -> None:
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(pictures.png(pictures.kld_by_size(FILES))))
    assert pixels.shape[2] == 4 and pixels[0, 0, 3] == 0
    solid = pixels[pixels[:, :, 3] == 1][:, :3]
    inks = np.array([[int(ink[i : i + 2], 16) / 255 for i in (1, 3, 5)] for ink in (INK, BLUE)])
    apart = np.abs(solid[:, None] - inks).max(-1).min(-1)
    assert np.quantile(apart, 0.9) < 0.02, "but for blends at edges"


def test_svg_is_the_same_for_the_same_figures() -> None:
    first, second = (pictures.svg(pictures.kld_by_size(FILES)) for _ in range(2))
    assert first == second and first.startswith("<svg")


def test_names_are_text_and_no_formulas() -> None:
    evil = Measured(r"$\frac{1}{0}$ <script>x</script>", 10**6, 0.1, 0.01)
    text = pictures.svg(pictures.kld_by_size([evil]))
    assert "<script" not in text and pictures.png(pictures.kld_by_size([evil])).startswith(b"\x89PNG")


def test_error_bars_stay_on_a_logarithmic_axis() -> None:
    """Two standard errors may be more than the mean itself."""
    wide = Measured("x", 10**6, 0.001, 0.01)
    figure = pictures.kld_by_size([wide, Measured("zero", 10**6, 0.0, 0.0)])
    assert pictures.png(figure).startswith(b"\x89PNG")
    assert figure.axes[0].get_ylim()[0] > 0


def test_layers_and_tokens() -> None:
    layers = [LayerFigures(i, 1 - 1e-4 * i, 1 - 1e-3 * i, 1e-4 * i, math.nan) for i in range(5)]
    for figure in (pictures.error_by_layer(layers), pictures.kld_by_tokens(FILES)):
        assert re.search(r"<svg .*</svg>", pictures.svg(figure), re.DOTALL)
    assert pictures.kld_by_tokens(FILES).axes[0].get_xscale() == "log"


def test_kinds_of_files_are_lines_in_pairs_of_one_ink() -> None:
    kinds = [
        Curve("tiers", [(10**6, 0.2, "<b>"), (2 * 10**6, 0.0, "$x$")]),
        Curve("fitted", [(10**6, 0.2, "")]),
        Curve("tiers, other", [(10**6, 0.1, "")]),
    ]
    (axes,) = pictures.curves_by_size(kinds).axes
    lines = axes.get_lines()
    assert [line.get_color() for line in lines] == [BLUE, BLUE, ORANGE]
    assert [line.get_linestyle() for line in lines] == ["--", "-", "--"]
    assert all((np.asarray(line.get_ydata()) > 0).all() for line in lines)
    assert "<b>" not in pictures.svg(pictures.curves_by_size(kinds))
