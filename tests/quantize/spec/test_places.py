"""From --source to a model: folders, config.json alone, the tiny source, and names that are none of these."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from mq_quant.formats.errors import CheckpointError, ConfigError, RecipeError
from mq_quant.formats.hfq.layout import METADATA_LIMIT
from mq_quant.quantize.spec import places
from mq_quant.quantize.spec.places import (
    checked_place,
    choose_recipe,
    local_folder,
    model_files,
    open_place,
    side_files,
)
from mq_quant.quantize.spec.recipe import load_tier
from small_model import CONFIG

MINE = """
schema: 1
tier: mine
description: x
model: minimax-m2.7
rules: [{tensors: '.*', format: Q8F16}]
"""


def test_a_folder_names_the_model_and_has_no_imatrix_of_its_own(small: Path) -> None:
    model = choose_recipe("mq2", None, str(small)).model
    assert (model.name, model.place.folder, model.place.repository) == ("small", str(small), None)
    assert model.imatrix is None


def test_the_default_source_is_the_recipes_also_when_it_is_named() -> None:
    default = choose_recipe("mq2", None, None)
    assert default.model.place.repository == "MiniMaxAI/MiniMax-M2.7"
    assert choose_recipe("mq2", None, "MiniMaxAI/MiniMax-M2.7") == default


def test_another_repository_keeps_nothing_of_the_recipes_model() -> None:
    model = choose_recipe("mq2", None, "acme/other-m2").model
    assert (model.name, model.place.repository, model.config, model.imatrix) == (
        "other-m2", "acme/other-m2", None, None,
    )  # fmt: skip


def test_the_tiny_source_has_recipes_and_an_imatrix_of_its_own(tmp_path: Path) -> None:
    assert choose_recipe("mq2", None, "tiny") == load_tier("mq2", "tiny")
    mine = tmp_path / "mine.yaml"
    mine.write_text(MINE)
    model = choose_recipe(None, mine, "tiny").model
    assert (model.name, model.imatrix is not None) == ("tiny", True)


@pytest.mark.parametrize("tier", [None, "mq2"])
def test_exactly_one_of_tier_and_recipe_is_needed(tier: str | None, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml" if tier else None
    with pytest.raises(RecipeError, match="either --tier or --recipe"):
        choose_recipe(tier, path, None)


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c", "../x", ".hidden/x"])
def test_what_is_neither_folder_nor_repository_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        local_folder(name)


def test_an_address_with_a_token_is_refused_without_showing_it() -> None:
    with pytest.raises(CheckpointError, match=r"no such folder: https://hub\.example/a/b") as e:
        local_folder("https://worker:hf_sesamesesame@hub.example/a/b")
    assert "sesame" not in str(e.value)


def test_a_file_is_not_taken_for_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path has the form owner/name, and the hub would be asked for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file, not a checkpoint's folder") as e:
        local_folder("model/a.safetensors")
    assert e.value.hint == "--source takes the folder of a checkpoint"
    (tmp_path / "model" / "config.json").touch()
    with pytest.raises(CheckpointError, match="is a file, not a checkpoint's folder") as e:
        local_folder("model/a.safetensors")
    assert e.value.hint == "give model"


@pytest.mark.parametrize("broken", [False, True])
def test_a_checked_source_is_closed_whatever_its_inventory_says(
    broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []

    class Opened:
        def validate(self) -> None:
            did.append("validate")
            if broken:
                raise CheckpointError("lacks a tensor")

        def close(self) -> None:
            did.append("close")

    monkeypatch.setattr(places, "open_place", lambda *given: Opened())
    with pytest.raises(CheckpointError) if broken else nullcontext(), checked_place("x", None, 2, None):
        did.append("work")
    assert did == ["validate", *([] if broken else ["work"]), "close"]


def test_config_alone_is_enough_to_plan(small: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((small / "config.json").read_text())
    for source in (tmp_path, tmp_path / "config.json"):
        files = model_files(choose_recipe("mq2", None, str(source)).model)
        assert files.config["hidden_size"] == 256
        assert not files.complete


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', '{"model_type": NaN}'])
def test_a_broken_config_is_an_error_that_names_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        model_files(choose_recipe("mq2", None, str(tmp_path)).model)


@pytest.mark.parametrize(
    ("name", "data"),
    [("tokenizer.json", b"\xff"), ("tokenizer.json", b"["), ("chat_template.jinja", b"\xff")],
)
def test_broken_side_files_are_errors_that_name_the_file(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=name):
        side_files(lambda wanted: tmp_path / wanted if wanted == name else None)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_side_files_that_are_pointers_or_too_large_are_told_so(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ConfigError, match=f"{name}: is a pointer file of Git LFS"):
        side_files(lambda wanted: path if wanted == name else None)
    with path.open("wb") as f:
        f.truncate(METADATA_LIMIT + 1)
    with pytest.raises(ConfigError, match=f"{name}: is larger than"):
        side_files(lambda wanted: path if wanted == name else None)


def test_line_ends_of_windows_are_those_of_the_text(tmp_path: Path) -> None:
    """Other programs read a template so."""
    (tmp_path / "chat_template.jinja").write_bytes(b"a\r\nb\rc\n")
    found = side_files(lambda name: tmp_path / name if name == "chat_template.jinja" else None)
    assert found.chat_template == "a\nb\nc\n"


def test_the_tokenizer_is_kept_byte_for_byte(tmp_path: Path) -> None:
    text = json.dumps({"model": {"vocab": {"é\u2028": 0}}}, ensure_ascii=False, indent=3)
    (tmp_path / "tokenizer.json").write_text(text)
    found = side_files(lambda name: tmp_path / name if name == "tokenizer.json" else None)
    assert found.tokenizer == text


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (f"models--acme--Small-M2/snapshots/{'1' * 40}", "Small-M2"),
        (f"models--small/snapshots/{'1' * 40}", "small"),
        (f"copy of it/snapshots/{'1' * 40}", "copy-of-it"),
        (f"models--acme--Small-M2/{'1' * 40}", "1" * 40),
        ("models--acme--Small-M2/snapshots/main", "models--acme--Small-M2"),
        ("my model", "my-model"),
    ],
)
def test_a_snapshot_is_named_after_its_repository(
    folder: str, name: str, small: Path, tmp_path: Path
) -> None:
    path = tmp_path / folder
    path.mkdir(parents=True)
    (tmp_path / "link").symlink_to(path)
    for source in (path, tmp_path / "link"):
        assert choose_recipe("mq2", None, str(source)).model.name == name


def test_what_is_there_and_no_folder_is_not_taken_for_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "link").symlink_to("nothing")
    os.mkfifo(tmp_path / "owner" / "pipe")
    for name, text in (("link", "is a link to nothing"), ("pipe", "is no folder")):
        with pytest.raises(CheckpointError, match=text):
            local_folder(f"owner/{name}")


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--revision goes with a hub repository"):
        open_place(str(tmp_path), "main", 2, None)


@pytest.mark.parametrize(
    "change",
    [{"quantization_config": [1]}, {"num_experts_per_tok": 9}, {"rotary_dim": 63}, {"head_dim": "x"}],
)
def test_a_plan_names_the_config_that_it_refuses(change: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ConfigError) as refused:
        model_files(choose_recipe("mq2", None, str(tmp_path)).model)
    assert refused.value.file == str(tmp_path / "config.json")
