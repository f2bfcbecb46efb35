"""The Python face: its example runs, importing it loads nothing, and its results are typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import mq_quant as mq
import numpy as np
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_importing_loads_nothing() -> None:
    script = (
        "import sys, mq_quant; "
        "print(sorted({'numpy', 'torch', 'numba', 'pydantic', 'typer', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_names_of_tiers_and_plans_wait_for_no_torch() -> None:
    script = (
        "import sys, mq_quant as mq; "
        "print(mq.plan_file(mq.load_recipe(mq.tiers()[0])).total_bytes > 0, "
        "sorted({'torch', 'numba', 'typer', 'scipy', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"


def test_every_name_is_there_and_documented() -> None:
    assert set(dir(mq)) == set(mq.__all__)
    for name in mq.__all__:
        value = getattr(mq, name)
        assert name == "__version__" or value.__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'built_file'"):
        mq.built_file  # noqa: B018


def test_the_example_in_its_docstring_runs_and_is_the_readmes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert mq.__doc__ is not None
    body = mq.__doc__.splitlines()[2:-2]
    example = "\n".join(line.removeprefix("    ") for line in body).strip()
    assert f"```python\n{example}\n```" in README
    names: dict[str, object] = {}
    exec(example, names)
    assert (tmp_path / "tiny.mq2").is_file()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("api") / "tiny.mq2-mini"
    result = mq.build_file(mq.load_recipe("mq2-mini", source="tiny"), path)
    assert (result.path, result.resumed_units) == (path, 0)
    return path


def test_a_plan_states_the_size_of_the_file(made: Path) -> None:
    plan = mq.plan_file(mq.load_recipe("mq2-mini", source="tiny"))
    assert plan.total_bytes == pytest.approx(made.stat().st_size, rel=0.01)
    assert "mq2-mini" in mq.tiers()


def test_recipes_are_tiers_or_files(tmp_path: Path) -> None:
    with pytest.raises(mq.MqError, match="there is no tier 'mq9'"):
        mq.load_recipe("mq9")
    with pytest.raises(mq.MqError):
        mq.load_recipe(tmp_path / "none.yaml")
    assert mq.load_recipe("mq3").tier == "mq3"


def test_a_file_is_compared_and_reproduced(made: Path) -> None:
    assert mq.diff_files(made, made).identical
    again = mq.reproduce_file(made)
    assert again.identical
    assert again.tensor_count > 0


def test_an_output_that_exists_is_refused(made: Path) -> None:
    with pytest.raises(mq.MqError, match="exists already"):
        mq.build_file(mq.load_recipe("mq2-mini", source="tiny"), made)


def test_a_source_gives_weights_by_name() -> None:
    source = mq.open_source("tiny")
    try:
        source.validate()
        name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
        assert source.weight(name).dtype == np.float32
    finally:
        source.close()


def test_a_calibration_feeds_a_build(tmp_path: Path) -> None:
    tokens = np.arange(64, dtype=np.int64).reshape(2, 32)
    result = mq.calibrate("tiny", tokens, tmp_path / "moments", down="pooled")
    assert (result.tokens, result.layers) == (64, 2)
    recipe = mq.load_recipe("mq2-mini", source="tiny")
    made = mq.build_file(recipe, tmp_path / "file", statistics=tmp_path / "moments")
    assert made.coverage is not None
    with pytest.raises(mq.MqError, match="outside the vocabulary"):
        mq.calibrate("tiny", tokens + 10**6, tmp_path / "other")


def test_a_recipe_is_fitted_to_a_size() -> None:
    recipe = mq.fit_recipe(size="85.0GB", avoid=["down:MQ4"])
    assert 84.5e9 < mq.plan_file(recipe).total_bytes <= 85e9
    with pytest.raises(mq.MqError, match="no budget was given"):
        mq.fit_recipe()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "either source or reference"),
        (
            {"source": "tiny", "tokens": np.zeros((2, 8), np.int32), "length": 8},
            "leave sequences and length out",
        ),
        ({"reference": "base.kld", "sequences": 2}, "holds its own tokens"),
    ],
)
def test_an_evaluation_refuses_what_would_be_without_effect(
    given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(mq.MqError, match=said):
        mq.evaluate_files([tmp_path / "no.hfq"], tmp_path / "evaluation.json", **given)
    assert not list(tmp_path.iterdir())
