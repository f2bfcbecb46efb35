"""Evaluations: many files in one pass are what each is alone, the source is read once, and a killed run continues."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hub_server
import numpy as np
import pytest
import small_model
import torch
from damaged import flip_bit, resign
from hub_server import MAIN, REPO, check_each_shard_was_fetched_once
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.errors import HfqError, InputError, OutputError, ResumeError
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.minimax import awq_scale_name
from mq_quant.quantize.calibrate.tokens import TokenRequest
from mq_quant.quantize.evaluate.reference import Reference, of_file
from mq_quant.quantize.evaluate.result import Evaluation, read_evaluation
from mq_quant.quantize.tiny.tokenizer import tokenizer_json
from mq_quant.quantize.write import outputs
from mq_quant.texts import EVALUATION_SHA256
from mq_quant.verify.model.hfq_weights import DecodedFile
from mq_quant.verify.model.metrics import Divergence
from transformers_model import huggingface
from watching import Heard

Made = Callable[[str], Path]
Evaluate = Callable[..., Evaluation]
TIERS = ("mq4", "mq3-lloyd", "mq3", "mq2-lloyd", "mq2", "mq2-mini")


class StopError(Exception):
    """Raised where a test interrupts a run."""


def stop_at(layer: int) -> Heard:
    """A watch that ends the work as soon as weights of a layer are counted."""

    def heard(doing: str) -> None:
        if doing == f"layer {layer}":
            raise StopError

    return Heard(then=heard)


def test_six_files_in_one_pass_are_what_each_is_alone(evaluate: Evaluate, made: Made, tmp_path: Path) -> None:
    paths = [made(tier) for tier in TIERS]
    together = evaluate(paths)
    assert [f.tier for f in together.files] == list(TIERS)
    for path, found in zip(paths, together.files, strict=True):
        (alone,) = evaluate([path], name="alone.json", force=True).files
        assert alone == found
        assert found.bytes == path.stat().st_size and len(found.layers) == 2
    klds = [f.divergence.kld_mean for f in together.files]
    assert klds[0] < min(klds[1:]) and max(klds[:-1]) < klds[-1]
    assert read_evaluation(tmp_path / "out.json") == together
    assert not list(tmp_path.glob("*partial*"))


def test_figures_are_those_of_transformers(
    evaluate: Evaluate, made: Made, small: Path, tokens: Path, tmp_path: Path
) -> None:
    """Both the source and the decoded file through transformers' own model."""
    path, checkpoint = made("mq3"), open_checkpoint(small)
    found = evaluate([path]).files[0].divergence
    ids = np.load(tokens)
    with open_hfq(path) as file, torch.no_grad():
        models = huggingface(checkpoint), huggingface(checkpoint, DecodedFile(file))
        theirs = [model(torch.from_numpy(ids)).logits for model in models]
    expected = Divergence()
    for sequence, (a, b) in enumerate(zip(*theirs, strict=True)):
        expected.add(a, b, ids[sequence])
    for name, value in vars(expected.summary()).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-4, rel=1e-4), name


def test_the_source_is_downloaded_once_for_six_files(
    small_hub: hub_server.HubServer,
    evaluate: Evaluate,
    made: Made,
    against: Callable[..., Reference],
    tmp_path: Path,
) -> None:
    paths = [made(tier) for tier in TIERS]
    streamed = evaluate(paths, reference=against(REPO), save_reference=tmp_path / "reference")
    local = evaluate(paths, name="local.json")
    assert [f.divergence for f in streamed.files] == [f.divergence for f in local.files]
    assert streamed.source == {"repository": REPO, "revision": MAIN}
    check_each_shard_was_fetched_once(small_hub)


def test_further_files_need_no_source(evaluate: Evaluate, made: Made, tmp_path: Path) -> None:
    exact = evaluate([made("mq2"), made("mq4")], save_reference=tmp_path / "reference")
    for tier, expected in zip(("mq2", "mq4"), exact.files, strict=True):
        with open_hfq(made(tier)) as file:
            reference = of_file(tmp_path / "reference", file)
        result = evaluate([made(tier)], name="again.json", reference=reference, force=True)
        found = result.files[0]
        assert (result.reference, result.tokens, result.source) == ("saved", exact.tokens, exact.source)
        assert found.divergence.kld_mean == pytest.approx(expected.divergence.kld_mean, rel=2e-3)
        assert found.divergence.ppl_test == expected.divergence.ppl_test
        assert found.layers == ()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_killed_run_continues_after_the_last_layer(
    layer: int, evaluate: Evaluate, made: Made, tmp_path: Path
) -> None:
    paths = [made("mq4"), made("mq2")]
    whole = evaluate(paths, name="whole.json")
    with pytest.raises(StopError):
        evaluate(paths, watch=stop_at(layer))
    assert not (tmp_path / "out.json").exists()
    result = evaluate(paths)
    assert result.resumed_layers == layer and result.files == whole.files


def test_a_damaged_stream_is_refused_and_a_restart_begins_anew(
    evaluate: Evaluate, made: Made, tmp_path: Path
) -> None:
    with pytest.raises(StopError):
        evaluate([made("mq2")], watch=stop_at(1))
    stream = tmp_path / "out.json.partial.evaluation" / "file0-00001.f32"
    stream.write_bytes(b"\0" * stream.stat().st_size)
    with pytest.raises(ResumeError, match=r"file0-00001\.f32: is not as the earlier run left it"):
        evaluate([made("mq2")])
    assert evaluate([made("mq2")], restart=True).resumed_layers == 0


def test_other_files_or_tokens_do_not_continue(
    evaluate: Evaluate, made: Made, against: Callable[..., Reference], tokens: Path
) -> None:
    with pytest.raises(StopError):
        evaluate([made("mq2")], watch=stop_at(1))
    with pytest.raises(ResumeError, match="begun with other arguments"):
        evaluate([made("mq2"), made("mq4")])
    np.save(tokens, np.load(tokens)[::-1])
    with pytest.raises(ResumeError, match=r"tokens\.sha256"):
        evaluate([made("mq2")])


def test_few_positions_and_another_source_are_told(
    evaluate: Evaluate, made: Made, against: Callable[..., Reference], tmp_path: Path
) -> None:
    other = small_model.save(tmp_path / "other", small_model.tensors(seed=1))
    notes = evaluate([made("mq2")], reference=against(other)).notes
    assert len(notes) == 2
    assert "small.mq2: was made from another source than the reference, model-00001" in notes[0]
    assert notes[1] == "judged by 96 positions only; at least 512 make a mean firm"


def test_a_broken_file_is_told_and_spoils_no_other(evaluate: Evaluate, made: Made, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mq2"
    broken.write_bytes(made("mq2").read_bytes())
    with open_hfq(broken) as file:
        at = file.entry(awq_scale_name(0)).offset
    with broken.open("r+b") as f:
        f.seek(at)
        f.write(np.array([math.nan], "<f2").tobytes())
    resign(broken)
    result = evaluate([broken, made("mq2")])
    assert math.isnan(result.files[0].divergence.kld_mean)
    assert result.files[1] == evaluate([made("mq2")], name="alone.json").files[0]
    assert result.notes[0] == "broken.mq2: its predictions are not numbers everywhere; the file is broken"
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["files"][0]["divergence"]["kld_mean"] is None
    assert math.isnan(read_evaluation(tmp_path / "out.json").files[0].divergence.kld_mean)


def test_files_of_other_models_are_refused(
    evaluate: Evaluate, made: Made, against: Callable[..., Reference], tmp_path: Path
) -> None:
    config = {**small_model.CONFIG, "num_local_experts": 4}
    wider = small_model.save(tmp_path / "wider", small_model.tensors(config=config), config=config)
    with pytest.raises(InputError, match="num_local_experts is 3, the source's 4"):
        evaluate([made("mq2")], reference=against(wider))
    saved = evaluate([made("mq2")], save_reference=tmp_path / "reference")
    with open_hfq(made("mq2")) as file:
        reference = of_file(tmp_path / "reference", file)
    assert saved.reference == "source" and reference.saved is not None
    fewer = replace(reference, saved=replace(reference.saved, vocabulary=299))
    with pytest.raises(InputError, match="vocabulary of 300 tokens, the reference one of 299"):
        evaluate([made("mq2")], name="x.json", reference=fewer)
    with pytest.raises(OutputError, match="nothing to save"):
        evaluate([made("mq2")], name="x.json", reference=reference, save_reference=tmp_path / "y")


def test_outputs_are_kept_and_a_full_disk_is_refused_before_any_work(
    evaluate: Evaluate, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.json").write_text("mine")
    for given in ({}, {"name": "new.json", "save_reference": tmp_path / "out.json"}):
        with pytest.raises(OutputError, match="exists already"):
            evaluate([made("mq2")], **given)
    assert (tmp_path / "out.json").read_text() == "mine"
    with pytest.raises(OutputError, match="its folder does not exist"):
        evaluate([made("mq2")], name="no/out.json")
    monkeypatch.setattr(outputs, "free_bytes", lambda folder: 1000)
    with pytest.raises(OutputError, match=r"its disk has 0\.0 GB free"):
        evaluate([made("mq2")], name="new.json")
    assert not list(tmp_path.glob("*partial*"))


def test_our_own_text_is_named(against: Callable[..., Reference], small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "worded")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(300)))
    own = against(folder, TokenRequest(sequences=2, length=16))
    assert own.tokens_record().text == EVALUATION_SHA256 and own.tokens.shape == (2, 16)
    assert against().tokens_record().text is None


@pytest.mark.parametrize(
    "tensor", ["model.embed_tokens.weight", small_model.W1, "model.norm.weight", "lm_head.weight"]
)
def test_a_damaged_file_gets_no_figures(evaluate: Evaluate, made: Made, tmp_path: Path, tensor: str) -> None:
    path = made("mq2")
    sound = path.read_bytes()
    flip_bit(path, tensor, 5)
    with pytest.raises(HfqError, match=f"small.mq2: {tensor}: its bytes are not those that were written"):
        evaluate([path])
    assert not (tmp_path / "out.json").exists()
    path.write_bytes(sound)  # fetched again: the evaluation continues
    assert evaluate([path]).files[0].divergence.kld_mean > 0
