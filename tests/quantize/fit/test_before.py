"""What is settled before a measurement: which tokens are set aside, and what the work takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from mq_quant.formats.checkpoint.source import Source
from mq_quant.formats.errors import TokenError
from mq_quant.formats.minimax import parse_config
from mq_quant.quantize.calibrate.tokens import EVALUATION, TokenRequest, load_tokens
from mq_quant.quantize.fit.before import cost_of, texts_of
from mq_quant.quantize.pipeline.statistics import OnTheFly
from mq_quant.quantize.spec.calibration_sizes import measuring_sizes, stream_group
from mq_quant.quantize.spec.places import open_place
from mq_quant.quantize.spec.recipe import load_model
from mq_quant.texts import CALIBRATION_SHA256


@pytest.fixture
def source(small: Path, tmp_path: Path) -> Iterator[Source]:
    with closing(open_place(str(small), None, 2, tmp_path)) as opened:
        yield opened


@pytest.mark.parametrize(("held_out", "said"), [(10, "10 sequences are too few"), (11, "compared on 11")])
def test_nothing_is_left_to_calibrate_on(source: Source, tokens: Path, held_out: int, said: str) -> None:
    with pytest.raises(TokenError, match=said):
        texts_of(source, TokenRequest(tokens=tokens), None, held_out, calibrates=True)


def test_more_is_asked_for_than_there_is(source: Source, tokens: Path) -> None:
    with pytest.raises(TokenError, match="compared on 11"):
        texts_of(source, TokenRequest(tokens=tokens), None, 11, calibrates=False)
    with pytest.raises(TokenError, match="fewer than the 20 asked for"):
        texts_of(source, TokenRequest(tokens=tokens, sequences=20), None, None, calibrates=True)


def test_the_last_sequences_are_set_aside(source: Source, tokens: Path) -> None:
    ids = np.load(tokens)
    for held_out, calibrates, expected in ((3, True, 3), (None, True, 2), (None, False, 10), (4, False, 4)):
        found = texts_of(source, TokenRequest(tokens=tokens), None, held_out, calibrates)
        np.testing.assert_array_equal(found.judging, ids[-expected:])
        np.testing.assert_array_equal(found.calibrating, ids[:-expected])
        assert found.text is None


def test_tokens_of_their_own_are_taken_at_even_distances(
    source: Source, tokens: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.npy"
    np.save(other, np.arange(60).reshape(6, 10))
    for held_out, expected in ((3, [0, 2, 4]), (4, [0, 1, 3, 4]), (None, range(6))):
        found = texts_of(source, TokenRequest(tokens=tokens), other, held_out, calibrates=True)
        np.testing.assert_array_equal(found.judging[:, 0] // 10, expected)
        assert len(found.calibrating) == 10
    with pytest.raises(TokenError, match=r"other.npy: has 6 sequences .* fewer than the 7 asked for"):
        texts_of(source, TokenRequest(tokens=tokens), other, 7, calibrates=True)


def test_without_a_text_it_is_what_builds_calibrate_on_and_evaluations_judge_on(tmp_path: Path) -> None:
    with closing(open_place("tiny", None, 2, tmp_path)) as tiny:
        asked = TokenRequest(sequences=5, length=32)
        found = texts_of(tiny, asked, None, 2, calibrates=True)
        np.testing.assert_array_equal(found.calibrating, load_tokens(tiny, asked))
        whole = load_tokens(tiny, TokenRequest(length=32), EVALUATION)
        np.testing.assert_array_equal(found.judging, whole[[0, len(whole) // 2]])
        assert found.text == CALIBRATION_SHA256
        alone = texts_of(tiny, asked, None, 2, calibrates=False)
        assert len(alone.calibrating) == 0
        np.testing.assert_array_equal(alone.judging, found.judging)


def test_what_it_takes(source: Source, tokens: Path) -> None:
    texts = texts_of(source, TokenRequest(tokens=tokens), None, 3, calibrates=True)
    plain, gathering = (cost_of(source, texts, s, jobs=1) for s in (None, OnTheFly()))
    assert (plain.tokens, gathering.tokens) == (0, 7 * 24)
    assert plain.judged_tokens == gathering.judged_tokens == 3 * 24
    assert plain.disk_bytes < gathering.disk_bytes and plain.memory_bytes < gathering.memory_bytes
    assert plain.hours <= gathering.hours
    without = cost_of(source, texts, OnTheFly(sensitivity=False), jobs=1)
    assert without.disk_bytes < gathering.disk_bytes and without.hours <= gathering.hours


def test_memory_does_not_grow_with_the_layers() -> None:
    raw = dict(load_model("minimax-m2.7").config or {})
    models = [{**raw, "num_hidden_layers": n, "attn_type_list": [1] * n} for n in (4, 62)]
    few, many = (measuring_sizes(parse_config(model), 4096, 4, 7, jobs=4) for model in models)
    assert few.memory_bytes == many.memory_bytes < 8e9
    assert few.disk_bytes < many.disk_bytes < 60e9
    assert stream_group(parse_config(raw), 4096) == 1
