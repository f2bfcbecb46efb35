"""A tokenizer.json that the engine cannot use with its model is refused on metadata alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.errors import TokenError
from mq_quant.formats.tokenizer import check_tokenizer, vocabulary_problems
from mq_quant.quantize.spec.places import choose_recipe, model_files
from mq_quant.quantize.tiny.tokenizer import tokenizer_json
from small_model import save, tensors

SIZE = 300
Document = dict[str, Any]


def with_token(number: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        document["model"]["vocab"]["mine"] = number

    return change


def with_added(**changes: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        document["added_tokens"][1] |= changes

    return change


def with_merge(merge: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        document["model"]["merges"].append(merge)

    return change


def problems(change: Callable[[Document], Any], size: int = SIZE) -> list[str]:
    document = tokenizer_json(SIZE)
    change(document)
    return list(vocabulary_problems(document, size))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (with_token(SIZE), "gives the token 'mine' the id 300, and the model's vocabulary ends with 299"),
        (with_token(1 << 70), f"'mine' the id {1 << 70}"),
        (with_token(-1), "'mine' the id -1, which is none"),
        (with_token(1.0), "'mine' the id 1.0"),
        (with_token(True), "'mine' the id True"),
        (with_token(None), "'mine' the id None"),
        (with_added(id=SIZE), "'<|user|>' the id 300, and the model's vocabulary ends with 299"),
        (with_added(id="7"), "'<|user|>' the id '7', which is none"),
        (with_added(content=None), "the token None the id"),
        (with_merge("a"), "merges 'a', of which"),
        (with_merge("Ġ zz"), "merges 'Ġ zz', of which"),
        (with_merge(["q", "q"]), "merges ['q', 'q'], of which"),
        (with_merge(["q", 1]), "merges ['q', 1], of which"),
        (with_merge(None), "merges None, of which"),
        (lambda d: d["model"]["vocab"].pop("Ġ"), "1 of the 256 byte symbols"),
        (lambda d: d.update(model=[]), "no 'vocab' of tokens and ids"),
        (lambda d: d["model"].update(vocab=[["a", -1.0]]), "no 'vocab' of tokens and ids"),
        (lambda d: d.update(added_tokens=[3]), "its 'added_tokens' is no list of objects"),
        (lambda d: d.update(added_tokens={"<s>": 1}), "its 'added_tokens' is no list of objects"),
    ],
)
def test_what_the_engine_cannot_use_is_named(change: Callable[[Document], Any], named: str) -> None:
    found = problems(change)
    assert named in found[0], found


@pytest.mark.parametrize(
    "change",
    [
        lambda d: None,
        lambda d: d.update(added_tokens=None),
        lambda d: d["model"].pop("merges"),
        lambda d: d["model"].update(merges=[" ".join(pair) for pair in d["model"]["merges"]]),
        with_added(id=5),  # an id may be given twice
        lambda d: d["added_tokens"].append({"content": "Ġq", "id": 7}) or with_merge("Ġ q")(d),
    ],
)
def test_what_it_can_use_is_taken(change: Callable[[Document], Any]) -> None:
    assert problems(change) == []


def test_a_padded_vocabulary_and_ids_with_gaps_are_taken() -> None:
    assert problems(with_added(id=SIZE + 40), SIZE + 64) == []


def test_a_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(SIZE)))
    check_tokenizer(path, SIZE)
    check_tokenizer(None, SIZE)
    with pytest.raises(TokenError, match=r"tokenizer\.json: gives the token .*vocab_size 298\n  give the"):
        check_tokenizer(path, SIZE - 2)
    path.write_text('{"model": ')
    with pytest.raises(TokenError, match=r"tokenizer\.json: is not JSON"):
        check_tokenizer(path, SIZE)
    path.unlink()
    with pytest.raises(TokenError, match="cannot be read: No such file"):
        check_tokenizer(path, SIZE)


def test_a_checkpoint_and_a_plan_of_it_are_refused_before_any_work(tmp_path: Path) -> None:
    small = save(tmp_path / "small", tensors())
    document = tokenizer_json(SIZE)
    document["added_tokens"].append({"content": "<mine>", "id": SIZE})
    (small / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TokenError, match="'<mine>' the id 300"):
        open_checkpoint(small).validate()
    with pytest.raises(TokenError, match="'<mine>' the id 300"):
        model_files(choose_recipe("mq2", None, str(small)).model)
