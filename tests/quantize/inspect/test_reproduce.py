"""reproduce: what a file says of itself gives its bytes again, and a stranger's file decides nothing about places."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mq_quant.formats.errors import CheckError, CheckpointError, ImatrixError, MqError, RecipeError
from mq_quant.formats.hfq import layout, open_hfq, write_hfq
from mq_quant.formats.hub.client import Hub
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.inspect.reproduce import Inputs, reproduce
from mq_quant.quantize.pipeline.build import BuildResult
from mq_quant.quantize.pipeline.statistics import NoStatistics
from mq_quant.quantize.pipeline.work_units import WorkUnit
from watching import Heard

Run = Callable[..., BuildResult]
W1 = "model.layers.0.block_sparse_moe.experts.1.w1.weight"


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a file whose provenance was changed, as a stranger could."""
    with open_hfq(path) as file:
        metadata = copy.deepcopy(file.metadata)
        change(metadata["mq_quant"])
        write_hfq(path.with_name("edited"), metadata, [(e, file.read(e.name)) for e in file.entries])
    return path.with_name("edited")


def model_of(record: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = record["recipe"]["model"]
    return found


def test_a_file_is_reproduced_from_its_provenance(run: Run, tmp_path: Path, small: Path) -> None:
    count = run("a").tensor_count
    result = reproduce(tmp_path / "a", Inputs(str(small), small / "imatrix.gguf"), 2)
    assert result.identical
    assert result.tensor_count == count
    run("plain", statistics=NoStatistics(), alpha=None)
    assert reproduce(tmp_path / "plain", Inputs(str(small)), 1).identical


def test_reproduce_names_the_tensor_that_was_altered(run: Run, tmp_path: Path, small: Path) -> None:
    run("a")
    data = bytearray((tmp_path / "a").read_bytes())
    with open_hfq(tmp_path / "a") as file:
        data[file.entry(W1).offset + 10] ^= 1
    (tmp_path / "altered").write_bytes(data)
    result = reproduce(tmp_path / "altered", Inputs(str(small), small / "imatrix.gguf"), 2)
    assert result.different_tensors == (W1,)


def test_reproduce_refuses_other_inputs_by_name(run: Run, tmp_path: Path, small: Path) -> None:
    run("a")
    with pytest.raises(RecipeError, match="give the folder as --source"):
        reproduce(tmp_path / "a")
    with pytest.raises(ImatrixError, match="--imatrix"):
        reproduce(tmp_path / "a", Inputs(str(small)), 1)
    other = shutil.copytree(small, tmp_path / "small")
    (other / "tokenizer.json").write_text((small / "tokenizer.json").read_text() + "\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not the file"):
        reproduce(tmp_path / "a", Inputs(str(other), small / "imatrix.gguf"), 1)
    changed = bytearray((small / "imatrix.gguf").read_bytes())
    changed[-1] ^= 1
    (tmp_path / "imatrix").write_bytes(changed)
    with pytest.raises(ImatrixError, match="not the one that this was made with"):
        reproduce(tmp_path / "a", Inputs(str(small), tmp_path / "imatrix"), 1)


def test_reproduce_refuses_a_file_whose_layout_is_not_its_recipes(
    run: Run, tmp_path: Path, small: Path
) -> None:
    run("a")
    with open_hfq(tmp_path / "a") as file:
        metas = [(e, file.read(e.name)) for e in file.entries if e.name != W1]
        assert (
            layout(file.metadata_bytes, [e for e, _ in metas]).total_bytes < (tmp_path / "a").stat().st_size
        )
        write_hfq(tmp_path / "b", file.metadata_bytes, metas)
    with pytest.raises(CheckError, match="not those that its recipe gives"):
        reproduce(tmp_path / "b", Inputs(str(small), small / "imatrix.gguf"), 1)


def test_hooks_see_every_unit(run: Run, tmp_path: Path, small: Path) -> None:
    made = run("plain", statistics=NoStatistics(), alpha=None)
    heard = Heard()
    done: list[WorkUnit] = []
    reproduce(
        tmp_path / "plain",
        Inputs(str(small)),
        watch=heard,
        on_done=done.append,
    )
    weights = sum(unit.weights for unit in done)
    assert heard.phase("comparing") == (weights, 0, weights) and len(done) == made.units


STRANGE = {"file": "imatrix.gguf", "repository": "stranger/tracker", "revision": None}


@pytest.fixture
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any use of the hub fails the test."""
    monkeypatch.setattr(Hub, "__init__", lambda *_, **__: pytest.fail("the hub was asked"))


@pytest.mark.usefixtures("nothing_is_fetched")
@pytest.mark.parametrize(
    ("place", "words"),
    [
        (STRANGE, "imatrix of 'stranger/tracker', a repository that this program does not know"),
        ({**STRANGE, "repository": "/etc"}, "does not know"),
        ({"file": "/etc/passwd"}, "'/etc/passwd', which is not the name of a file inside"),
        ({"file": "../secret"}, "not the name of a file inside"),
        ({"file": "a/../../secret"}, "not the name of a file inside"),
        ({"file": "a//b"}, "not the name of a file inside"),
        ({"file": "..\\secret"}, "not the name of a file inside"),
        ({"file": ""}, "not the name of a file inside"),
        ({"file": 5}, "imatrix.file"),
        ("imatrix.gguf", "imatrix"),
    ],
)
def test_the_imatrix_that_a_stranger_names_is_neither_read_nor_fetched(
    place: Any, words: str, run: Run, tmp_path: Path, small: Path
) -> None:
    run("a")
    file = edited(tmp_path / "a", lambda record: model_of(record).update(imatrix=place))
    with pytest.raises(MqError) as caught:
        reproduce(file, Inputs(str(small)))
    assert words in str(caught.value) and "edited" in str(caught.value)


@pytest.mark.usefixtures("nothing_is_fetched")
@pytest.mark.parametrize("place", ["stranger/tracker", "/etc", "."])
def test_the_source_that_a_stranger_names_is_neither_read_nor_fetched(
    place: str, run: Run, tmp_path: Path
) -> None:
    run("a", statistics=NoStatistics(), alpha=None)

    def change(record: dict[str, Any]) -> None:
        model_of(record)["source"] = {"repository": place}

    with pytest.raises(RecipeError, match=r"a repository that this program does not know\n.*--source"):
        reproduce(edited(tmp_path / "a", change))

    def folder(record: dict[str, Any]) -> None:
        model_of(record)["source"] = {"folder": "/etc"}

    with pytest.raises(RecipeError, match="give the folder as --source"):
        reproduce(edited(tmp_path / "a", folder))


def test_an_imatrix_that_the_person_names_is_used_whatever_the_file_says(
    run: Run, tmp_path: Path, small: Path
) -> None:
    run("a")
    file = edited(tmp_path / "a", lambda record: model_of(record).update(imatrix=STRANGE))
    assert reproduce(file, Inputs(str(small), small / "imatrix.gguf")).identical


@pytest.mark.parametrize("value", [None, 5, "text", [1], True, {}, {"files": "text"}, {"files": {"a": 1}}])
@pytest.mark.parametrize("key", ["recipe", "source", "imatrix", "calibration", "program"])
def test_records_of_other_types_are_refused_or_counted_as_absent(
    key: str, value: Any, run: Run, tmp_path: Path, small: Path
) -> None:
    run("a", statistics=NoStatistics(), alpha=None)
    file = edited(tmp_path / "a", lambda record: record.update({key: value}))
    try:
        result = reproduce(file, Inputs(str(small)))
    except MqError as e:
        assert "edited" in str(e) or "imatrix" in str(e)
    else:
        assert result.identical


def test_what_the_file_was_made_without_is_refused_and_not_ignored(
    run: Run, tmp_path: Path, small: Path
) -> None:
    run("plain", statistics=NoStatistics(), alpha=None)
    for inputs, text in (
        (Inputs(str(small), imatrix=tmp_path / "none"), "was made without an imatrix"),
        (Inputs(str(small), calibration=tmp_path / "none"), "was made without a calibration"),
        (Inputs(str(small), tokens=TokenRequest(tokens=tmp_path / "none")), "was not calibrated on tokens"),
    ):
        with pytest.raises(MqError, match=text):
            reproduce(tmp_path / "plain", inputs, 1)
