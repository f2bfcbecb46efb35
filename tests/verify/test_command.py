"""`mq-quant verify` and `compare-hidden` as a user meets them: exit codes, JSON, messages that name the fault."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mq_quant.formats.checkpoint.local import Checkpoint
from mq_quant.formats.errors import InputError, TokenError
from mq_quant.formats.hfq import open_hfq
from mq_quant.quantize.calibrate.token_file import read_token_file
from mq_quant.quantize.cli.app import main
from mq_quant.quantize.inspect.verify_inputs import VerifyOptions, inputs_of
from mq_quant.quantize.inspect.verify_tokens import cut
from plainfile import Build, Tensors, by_name

FEW = ["--tokens", "4", "--generate", "2", "--backend", "cpu"]


def run(arguments: list[str]) -> int:
    """The command's exit code."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    return int(exit_.value.code or 0)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A tier whose bars any sound file meets."""
    path = tmp_path / "recipe.yaml"
    head = "schema: 1\ntier: loose\ndescription: For tests.\nmodel: tiny\n"
    path.write_text(
        f"{head}rules: [{{tensors: '.*', format: Q8F16}}]\nverify: {{cosine_mean: 0.5, kld_mean: 5}}\n"
    )
    return path


def test_a_sound_file(
    build: Build, checkpoint: Checkpoint, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--source", str(checkpoint.path), "--recipe", str(recipe), *FEW]
    outputs = ["--report", str(tmp_path / "r.html"), "--dump-hidden", str(tmp_path / "a.hfhs")]
    assert run(["verify", str(build()), *options, *outputs, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["ok"] and result["skipped"] == {}
    assert [s["stage"] for s in result["stages"]] == [
        "structure",
        "decode",
        "forward",
        "fidelity",
        "predictions",
        "generation",
    ]
    assert all(stage["seen"] > 0 and stage["ok"] for stage in result["stages"])
    predictions = result["stages"][4]
    assert predictions["positions"] == 4 and 0 < predictions["kld_mean"] < 5
    assert "forward: ok (4 positions)" in err
    assert (tmp_path / "r.html").read_text().count("<figure") == 3
    assert run(["compare-hidden", str(tmp_path / "a.hfhs"), str(tmp_path / "a.hfhs"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][1]["max_difference"] == 0


def test_a_bar_that_does_not_hold_is_exit_code_1(
    build: Build, checkpoint: Checkpoint, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(recipe.read_text().replace("0.5, kld_mean: 5", "0.9999999, top1: 1.0"))
    options = ["--source", str(checkpoint.path), "--recipe", str(recipe), *FEW]
    assert run(["verify", str(build()), *options]) == 1
    out, err = capsys.readouterr()
    assert "FAILED" in out and "layer 0: cosine_mean is" in out
    assert "error: " in err and "predictions: layer 0: cosine_mean is" in err and "Traceback" not in err


def test_without_a_source_only_the_file_is_judged(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(build()), *FEW, "--sample", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["skipped"]) == {"fidelity", "predictions"}
    assert [s["stage"] for s in result["stages"]] == ["structure", "decode", "forward", "generation"]


def test_a_damaged_file_is_named_and_json_stays_one_object(
    build: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(_: dict[str, Any], tensors: Tensors) -> None:
        by_name(tensors)["lm_head.weight"][100] ^= 4

    assert run(["verify", str(build(change=change)), *FEW, "--generate", "0", "--json"]) == 1
    out, err = capsys.readouterr()
    assert not json.loads(out)["ok"]
    assert "lm_head.weight: its bytes are not those that were written" in err


def test_a_truncated_file_is_bad_input(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    path = build()
    os.truncate(path, path.stat().st_size - 7)
    assert run(["verify", str(path)]) == 2
    assert "lm_head.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--source", "./nowhere"], "no such folder"),
        (["--backend", "abacus"], "'abacus' is not one of"),
        (["--token-file", "./nowhere"], "cannot be read"),
        (["--generate", "1000000000"], "positions"),
        (["--prompt", "a\udcff"], "not UTF-8 text"),
        (["--imatrix", "./nowhere"], "none is given"),
        (["--recipe", "./nowhere"], "cannot be read"),
        (["--report", "./nowhere/page.html"], "nowhere/page.html: its folder does not exist"),
    ],
)
def test_options_that_cannot_be_used_are_exit_code_2_or_1(
    build: Build, options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(build()), *options]) in (1, 2)
    err = capsys.readouterr().err
    assert text in err and "Traceback" not in err


@pytest.mark.parametrize("option", ["--report", "--dump-hidden"])
def test_what_is_judged_is_not_written_over(
    build: Build, option: str, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    file, config = build(), checkpoint.path / "config.json"
    for path in (file, config):
        before = path.read_bytes()
        assert run(["verify", str(file), "--source", str(checkpoint.path), option, str(path)]) == 2
        assert "is an input of this command" in capsys.readouterr().err
        assert path.read_bytes() == before


def test_dumps_that_differ_are_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mq_quant.verify.hidden import HiddenWriter

    rng = np.random.default_rng(1)
    for name in "ab":
        with HiddenWriter(tmp_path / name, 2, 3, 8) as writer:
            for _ in range(2):
                writer.add(rng.standard_normal((3, 8)).astype(np.float32))
    assert run(["compare-hidden", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "layers [0, 1]" in capsys.readouterr().err


def test_tokens_of_prompt_file_and_source(build: Build, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = str(checkpoint.path)
    (tmp_path / "ids.txt").write_text("1 2 3\n\n4 5 6\n")
    with open_hfq(build()) as file:
        held_out = inputs_of(file, VerifyOptions(source=folder, tokens=40)).tokens
        assert held_out is not None and held_out.shape == (1, 32)
        from_file = inputs_of(file, VerifyOptions(source=folder, token_file=tmp_path / "ids.txt")).tokens
        assert from_file is not None and from_file.tolist() == [[1, 2, 3], [4, 5, 6]]
        for wanted, shape in ((3, (1, 3)), (4, (2, 3)), (2, (1, 2)), (60, (2, 3))):
            options = VerifyOptions(source=folder, token_file=tmp_path / "ids.txt", tokens=wanted)
            first = inputs_of(file, options).tokens
            assert first is not None and first.shape == shape
        asked = inputs_of(file, VerifyOptions(source=folder, prompt=" bab cab"))
        assert asked.tokens is not None and asked.tokens.shape[0] == 1 and asked.bars.coherence
        chat = inputs_of(file, VerifyOptions(source=folder, prompt=" bab cab", chat=True)).tokens
        end = file.metadata["config"]["vocab_size"]
        assert chat is not None and [i - end for i in chat[0].tolist() if i >= end - 3] == [-2, -3, -1]
        assert asked.tokens[0].tolist() == chat[0, 1:-2].tolist()
        assert inputs_of(file, VerifyOptions(source=folder, tokens=0)).tokens is None


@pytest.mark.parametrize("given", [{"imatrix": Path("imatrix.gguf")}, {"revision": "main"}])
def test_what_goes_with_a_source_is_refused_without_one(build: Build, given: dict[str, Any]) -> None:
    with open_hfq(build()) as file, pytest.raises(InputError, match="the source, and none is given"):
        inputs_of(file, VerifyOptions(**given))


def test_tokens_that_nobody_chose_are_enough_to_judge_by(
    build: Build, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Those beside the source where there are so many, else our own text, or, without a tokenizer, fixed ids."""

    def change(metadata: dict[str, Any], _: Tensors) -> None:
        del metadata["tokenizer"]

    folder = str(checkpoint.path)
    held_out = np.load(checkpoint.path / "eval_tokens.npy")
    with open_hfq(build()) as file:
        some = inputs_of(file, VerifyOptions(source=folder, tokens=64))
        assert some.fewest == 64 and some.notes == () and np.array_equal(some.tokens, held_out)  # type: ignore[arg-type]
        enough = inputs_of(file, VerifyOptions(source=folder))
        assert enough.tokens is not None and enough.tokens.size >= 512 == enough.fewest and enough.notes == ()
        assert (
            enough.tokens.max() < file.metadata["config"]["vocab_size"] and len(np.unique(enough.tokens)) > 50
        )
        assert inputs_of(file, VerifyOptions(source=folder, tokens=1000)).fewest == 512
    with open_hfq(build(change=change)) as file:
        fixed = inputs_of(file, VerifyOptions())
        assert fixed.tokens is not None and fixed.tokens.size >= 512
        assert "no tokenizer, so fixed ids were run" in fixed.notes[0]


def test_a_short_prompt_is_continued_and_judges_nothing_unless_told_so(
    build: Build, checkpoint: Checkpoint, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--source",
        str(checkpoint.path),
        "--recipe",
        str(recipe),
        "--prompt",
        "bab cab",
        "--generate",
        "2",
    ]
    run(["verify", str(build()), *options, "--backend", "cpu", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert "positions, and fewer than 512 judge nothing" in result["skipped"]["predictions"]
    assert result["stages"][-1]["stage"] == "generation"
    run(["verify", str(build()), *options, "--backend", "cpu", "--json", "--tokens", "1"])
    assert "predictions" not in json.loads(capsys.readouterr().out)["skipped"]


def test_a_short_file_of_tokens_is_refused_unless_told_so(
    build: Build, checkpoint: Checkpoint, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids.txt").write_text("1 2 3\n4 5 6\n")
    options = [
        "--source",
        str(checkpoint.path),
        "--recipe",
        str(recipe),
        "--token-file",
        str(tmp_path / "ids.txt"),
    ]
    assert run(["verify", str(build()), *options, "--generate", "0", "--backend", "cpu"]) == 1
    assert "there are 6 positions, too few to judge by: 512 are the fewest" in capsys.readouterr().err
    assert (
        run(["verify", str(build()), *options, "--generate", "0", "--backend", "cpu", "--tokens", "6"]) == 0
    )


@pytest.mark.parametrize(
    "template", [None, "{% for", "{{ messages.__class__.__mro__ }}", "{{ nothing.at.all }}"]
)
def test_chat_templates_that_cannot_be_used_are_refused(build: Build, template: str | None) -> None:
    def change(metadata: dict[str, Any], _: Tensors) -> None:
        metadata["tokenizer_config"]["chat_template"] = template

    with open_hfq(build(change=change)) as file, pytest.raises(TokenError, match="chat template"):
        inputs_of(file, VerifyOptions(prompt="hello", chat=True))


def test_a_template_writes_its_own_bos_and_a_plain_prompt_gets_that_of_the_tokenizer(build: Build) -> None:
    """Exactly one of them in both cases; with a template that writes none, there is none."""

    def with_bos(template: str) -> Any:
        def change(metadata: dict[str, Any], _: Tensors) -> None:
            tokenizer = json.loads(metadata["tokenizer"])
            bos = tokenizer["added_tokens"][0]["id"]
            pieces = [{"SpecialToken": {"id": "B", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
            tokenizer["post_processor"] = {
                "type": "TemplateProcessing",
                "single": pieces,
                "pair": pieces,
                "special_tokens": {"B": {"id": "B", "ids": [bos], "tokens": ["<|end|>"]}},
            }
            metadata["tokenizer"] = json.dumps(tokenizer)
            metadata["tokenizer_config"] |= {"bos_token": "<|end|>", "chat_template": template}

        return change

    def prompt(template: str, chat: bool) -> list[int]:
        with open_hfq(build(change=with_bos(template))) as file:
            found = inputs_of(file, VerifyOptions(prompt="bab", chat=chat)).prompt
            assert found is not None
            return [int(i) for i in found]

    with_template = prompt("{{ bos_token }}{{ messages[0].content }}", True)
    assert with_template == prompt("", False)
    assert with_template[1:] == prompt("{{ messages[0].content }}", True)


def test_a_prompt_without_a_token_is_refused(build: Build) -> None:
    with open_hfq(build()) as file, pytest.raises(TokenError, match="gives no token"):
        inputs_of(file, VerifyOptions(prompt=""))


def test_a_tokenizer_of_another_model_is_named(build: Build) -> None:
    def change(metadata: dict[str, Any], _: Tensors) -> None:
        tokenizer = json.loads(metadata["tokenizer"])
        tokenizer["added_tokens"] = []
        tokenizer["model"] = {"type": "WordLevel", "unk_token": "x", "vocab": {"x": 10**6}}
        metadata["tokenizer"] = json.dumps(tokenizer)

    with open_hfq(build(change=change)) as file:
        for wanted in (VerifyOptions(prompt="hello"), VerifyOptions()):
            with pytest.raises(TokenError, match="token 1000000, outside the vocabulary"):
                inputs_of(file, wanted)


def test_cut_keeps_whole_sequences() -> None:
    ids = np.arange(40).reshape(4, 10)
    assert cut(ids, 25).shape == (2, 10)
    assert cut(ids, 3).tolist() == [[0, 1, 2]]
    assert cut(ids, 1000).shape == (4, 10)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "does not hold token ids: it is empty"),
        (b"1 2\n3", "does not hold token ids"),
        (b"one two", "does not hold token ids"),
        (b"\xff\xfe", "does not hold token ids"),
        (b"\x93NUMPY\x01\x00", "does not hold token ids"),
    ],
)
def test_files_that_hold_no_tokens_are_refused(tmp_path: Path, raw: bytes, text: str) -> None:
    (tmp_path / "ids").write_bytes(raw)
    with pytest.raises(TokenError, match=text):
        read_token_file(tmp_path / "ids")


def test_token_arrays_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for i, array in enumerate((np.ones((2, 2)), np.zeros((1, 2, 3), int), np.array([{}], object))):
        np.save(tmp_path / f"{i}.npy", array, allow_pickle=True)
        with pytest.raises(TokenError):
            read_token_file(tmp_path / f"{i}.npy")
