"""The model card: true to what was measured, valid for the hub, and proof against names and texts of strangers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import hub_server
import numpy as np
import pytest
import small_model
from damaged import flip_bit
from hub_server import MAIN, REPO
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt
from mq_quant.formats.errors import HfqError, InputError, OutputError
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.evaluate.reference import of_checkpoint
from mq_quant.quantize.evaluate.result import Evaluation
from mq_quant.quantize.evaluate.run import EvaluateOptions, evaluate_files
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.build_spec import RecipeChanges
from mq_quant.quantize.pipeline.statistics import NoStatistics
from mq_quant.quantize.publish.base_model import BaseModel, base_model
from mq_quant.quantize.publish.card import CardOptions, write_card
from mq_quant.quantize.publish.card_text import render_card
from mq_quant.quantize.publish.facts import read_facts
from mq_quant.quantize.spec.places import choose_recipe, open_place
from mq_quant.quantize.spec.recipe import Rule
from mq_quant.quantize.write import atomic

TIERS = ("mq4", "mq3-lloyd", "mq3", "mq2-lloyd", "mq2", "mq2-mini")
EVIL = "<script>alert(1)</script> | `x` [y](z)\n\n# no heading"


class Tables(HTMLParser):
    """The cells of a page's tables, its tags and its pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.pictures: list[str] = []
        self.feed(MarkdownIt("commonmark").enable("table").render(text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "img":
            self.pictures.append(dict(attrs)["src"] or "")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data.replace("\u00a0", " ")

    def row(self, name: str, columns: int) -> list[str]:
        return next(row for row in self.rows if row and row[0] == name and len(row) == columns)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_model.save(tmp_path_factory.mktemp("card") / "small", small_model.tensors())
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: modified-mit\nlicense_link: LICENSE\nlanguage: [en, zh]\n"
        "pipeline_tag: text-generation\n---\n# Small\n"
    )
    return folder


@pytest.fixture(scope="module")
def files(source: Path) -> list[Path]:
    """All tiers by the plainest fit."""
    paths = []
    for tier in TIERS:
        recipe = choose_recipe(tier, None, str(source))
        path = source.parent / f"small.{tier}"
        build_file(recipe, NoStatistics(), RunOptions(path, 2), RecipeChanges(fit="reference"))
        paths.append(path)
    return paths


def evaluate(paths: list[Path], source: Path, output: Path) -> Evaluation:
    np.save(output.with_suffix(".npy"), np.random.default_rng(0).integers(0, 300, (4, 24)))
    opened = open_place(str(source), None, 2, None)
    request = TokenRequest(tokens=output.with_suffix(".npy"))
    return evaluate_files(
        paths, of_checkpoint(opened, request, opened.fingerprint()), EvaluateOptions(output)
    )


@pytest.fixture(scope="module")
def evaluation(files: list[Path], source: Path) -> Path:
    evaluate(files, source, source.parent / "evaluation.json")
    return source.parent / "evaluation.json"


def test_the_table_is_what_six_single_evaluations_say(
    files: list[Path], evaluation: Path, source: Path, tmp_path: Path
) -> None:
    result = write_card(files, tmp_path / "card", CardOptions(evaluation, base=str(source)))
    card = Tables((tmp_path / "card" / "README.md").read_text("utf-8"))
    for path in files:
        (alone,) = evaluate([path], source, tmp_path / f"{path.name}.json").files
        d = alone.divergence
        name, mean, median, p95, p99, p999, highest, top1, top8, ppl = card.row(path.name, 10)
        assert name == path.name
        assert float(mean.split(" ± ")[0]) == pytest.approx(d.kld_mean, abs=d.kld_error / 10)
        assert [float(v) for v in (median, p95, p99, p999, highest)] == [
            pytest.approx(v, rel=1e-3) for v in (d.kld_median, d.kld_p95, d.kld_p99, d.kld_p999, d.kld_max)
        ]
        assert (top1, top8) == (f"{100 * d.top1:.2f} %", f"{100 * d.top8:.2f} %")
        assert float(ppl.split(" ± ")[0]) == pytest.approx(d.ppl_test, abs=d.ppl_test_error / 10)
    assert card.pictures == ["kld-by-size.png"]
    assert {p.name for p in (tmp_path / "card").iterdir()} == {"README.md", "SHA256SUMS", *result.pictures}


def test_the_hub_reads_its_header(files: list[Path], evaluation: Path, source: Path, tmp_path: Path) -> None:
    write_card(files, tmp_path / "card", CardOptions(evaluation, base=str(source)))
    data = ModelCard((tmp_path / "card" / "README.md").read_text("utf-8")).data.to_dict()
    assert data == {
        "license": "other",
        "license_name": "modified-mit",
        "license_link": "LICENSE",
        "language": ["en", "zh"],
        "library_name": "hipfire",
        "pipeline_tag": "text-generation",
        "tags": ["hipfire", "hfq", "mq-quant", "quantized", "moe", "minimax_m2"],
    }


def test_formats_that_differ_from_layer_to_layer_are_all_named(source: Path, tmp_path: Path) -> None:
    recipe = choose_recipe("mq2", None, str(source))
    first = Rule(tensors=r"layers\.0\..*\.experts\.\d+\.w2\.weight$", format="MQ6")
    mixed = recipe.model_copy(update={"rules": (first, *recipe.rules)})
    build_file(mixed, NoStatistics(), RunOptions(tmp_path / "mixed", 2), RecipeChanges(fit="reference"))
    facts, _ = read_facts(tmp_path / "mixed")
    assert facts.gate_up == "MQ2-Lloyd"
    assert sorted(facts.down.split(", ")) == ["MQ3-Lloyd (1 layer)", "MQ6 (1 layer)"]


def test_sums_are_those_of_the_files(files: list[Path], source: Path, tmp_path: Path) -> None:
    result = write_card(files, tmp_path / "card", CardOptions(base=str(source)))
    lines = result.sums.read_text().splitlines()
    expected = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    assert {name: digest for digest, name in (line.split("  ") for line in lines)} == expected


def test_what_was_not_measured_is_not_claimed(
    files: list[Path], evaluation: Path, source: Path, tmp_path: Path
) -> None:
    write_card(files[:1], tmp_path / "none", CardOptions(base=str(source)))
    text = (tmp_path / "none" / "README.md").read_text("utf-8")
    assert "Nobody has measured it for this file yet" in text and "±" not in text
    document = json.loads(evaluation.read_text())
    document["files"] = document["files"][1:3]
    (tmp_path / "some.json").write_text(json.dumps(document))
    result = write_card(files, tmp_path / "some", CardOptions(tmp_path / "some.json", base=str(source)))
    card = Tables(result.readme.read_text("utf-8"))
    assert sum(len(row) == 10 for row in card.rows) == 1 + 2 + 1
    assert any(note.startswith("not measured: small.mq4, small.mq2-lloyd,") for note in result.notes)


def test_an_evaluation_of_other_files_is_refused(files: list[Path], evaluation: Path, tmp_path: Path) -> None:
    changed = evaluation.read_text().replace('"quantization_hash":"', '"quantization_hash":"f')
    (tmp_path / "other.json").write_text(changed)
    with pytest.raises(InputError, match="is of none of these files"):
        write_card(files, tmp_path / "card", CardOptions(tmp_path / "other.json"))
    for text in ("", "[]", "{}", '{"schema": 1}', changed.replace('"schema":1', '"schema":2')):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(InputError, match=r"is no evaluation|has schema 2"):
            write_card(files, tmp_path / "card", CardOptions(tmp_path / "other.json"))
    assert not (tmp_path / "card").exists()


def test_texts_of_strangers_become_no_markup(files: list[Path]) -> None:
    file, origin = read_facts(files[0])
    named = replace(file, description=EVIL, statistics=EVIL, program=EVIL, path=Path("a | `b` $(c).mq4"))
    text = render_card([named], replace(origin, model=EVIL), BaseModel(None, license=EVIL))
    card = Tables(text.split("---", 2)[2])
    assert "script" not in card.tags and "a" not in card.tags
    assert card.tags.count("h1") == 1
    assert card.row("a | 'b' $(c).mq4", 8)[7].startswith("mq4: <script>alert(1)</script> | `x` [y](z)")
    assert "mq-quant inspect 'a | `b` $(c).mq4' --provenance" in text
    assert ModelCard(text).data.license == EVIL


def test_a_card_that_exists_is_kept(files: list[Path], source: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        write_card(files, tmp_path, CardOptions(base=str(source)))
    assert (tmp_path / "README.md").read_text() == "mine"
    write_card(files, tmp_path, CardOptions(base=str(source), force=True))
    assert (tmp_path / "README.md").read_text("utf-8").startswith("---\n")
    with pytest.raises(OutputError, match="is not a folder"):
        write_card(files, files[0], CardOptions())


def test_files_of_two_models_get_no_common_card(files: list[Path], tmp_path: Path) -> None:
    other = small_model.save(tmp_path / "other", small_model.tensors(seed=1))
    recipe = choose_recipe("mq4", None, str(other))
    build_file(recipe, NoStatistics(), RunOptions(tmp_path / "other.mq4", 2), RecipeChanges(fit="reference"))
    with pytest.raises(InputError, match="is of other from None"):
        write_card([files[0], tmp_path / "other.mq4"], tmp_path / "card", CardOptions())
    twin = Path(shutil.copy(files[0], tmp_path / files[1].name))
    with pytest.raises(InputError, match="two files have this name"):
        write_card([files[1], twin], tmp_path / "card", CardOptions())


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.HubServer]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with hub_server.serve({REPO: {MAIN: hub_server.repository(source)}}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def test_the_licence_is_what_the_base_model_declares(hub: hub_server.HubServer, files: list[Path]) -> None:
    found = base_model(REPO, None)
    assert (found.license, found.license_name) == ("other", "modified-mit")
    assert found.license_link == f"https://huggingface.co/{REPO}/blob/main/LICENSE"
    file, origin = read_facts(files[0])
    data = ModelCard(render_card([file], replace(origin, repository=REPO), found)).data.to_dict()
    assert data["base_model"] == REPO and data["base_model_relation"] == "quantized"
    assert data["license_link"] == found.license_link


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, {}),
        ("# A model", {}),
        ("---\nlicense: mit\n", {}),
        ("---\n- a\n- b\n---\n", {}),
        ("---\nlicense: [mit]\nlanguage: en\n---\n", {"languages": ("en",)}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense_link: https://x.org/L\n---\n", {"license_link": "https://x.org/L"}),
    ],
)
def test_cards_with_and_without_a_header(text: str | None, found: dict[str, Any], tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text, encoding="utf-8", newline="")
    assert base_model(None, tmp_path) == BaseModel(None, **found)


def test_a_broken_header_is_refused_and_what_is_given_counts(
    files: list[Path], tmp_path: Path, source: Path
) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(InputError, match="its YAML header cannot be read"):
        base_model(None, tmp_path)
    given = CardOptions(base=str(source), license="mit", license_link="https://x.org/L")
    result = write_card(files[:1], tmp_path / "card", given)
    data = ModelCard(result.readme.read_text("utf-8")).data
    assert (data.license, data.license_name, data.license_link) == ("mit", "modified-mit", "https://x.org/L")


def test_a_card_without_a_licence_says_so(files: list[Path], tmp_path: Path) -> None:
    result = write_card(files[:1], tmp_path / "card", CardOptions())
    assert "license" not in ModelCard(result.readme.read_text("utf-8")).data.to_dict()
    assert any("declares no licence" in note for note in result.notes)


def test_a_full_disk_leaves_no_half_of_a_card(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: memoryview, offset: int | None = None) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "write_all", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write_card(files, tmp_path / "card")
    assert list((tmp_path / "card").iterdir()) == []


def test_no_card_is_written_of_a_damaged_file(files: list[Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(files[-1], tmp_path))
    flip_bit(path, small_model.W1, 7)
    with pytest.raises(HfqError, match=f"{small_model.W1}: its bytes are not those that were written"):
        write_card([path], tmp_path / "card")
    assert not (tmp_path / "card").exists()
