"""A kit as it is written: the same bytes each time, whole or not there, small enough, and good files in it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from mq_quant.formats.blocks import BY_NAME
from mq_quant.formats.errors import OutputError
from mq_quant.formats.hfq import open_hfq
from mq_quant.formats.minimax import expert_name, inventory, parse_config
from mq_quant.kernels.runtime.host import open_backend
from mq_quant.quantize.cli.app import main
from mq_quant.quantize.inspect.verify_inputs import VerifyOptions, inputs_of
from mq_quant.quantize.publish.kit.check_kit import judge
from mq_quant.quantize.publish.kit.make import POSITIONS, write_kit
from mq_quant.quantize.publish.kit.run import BrokenKitError, check_kit
from mq_quant.quantize.publish.kit.shapes import FULL, MIXED, PROMPTS, kit_models
from mq_quant.quantize.publish.kit.suspects import FAULTS
from mq_quant.quantize.publish.kit.vectors import FORMATS
from mq_quant.quantize.publish.kit.weights import write_model
from mq_quant.quantize.spec.recipe import tiers
from mq_quant.verify.run import verify

from .conftest import SMALL

LIMIT = 100 * 10**6


def test_a_model_has_the_same_bytes_on_every_machine(kit: Path, tmp_path: Path) -> None:
    write_model(SMALL, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (kit / "small" / "small.hfq").read_bytes()
    with open_hfq(tmp_path / "again") as file:
        assert file.metadata["quantization_hash"]["value"] == "efd50851966d5235"


def test_its_files_pass_verification(kit: Path) -> None:
    with open_hfq(kit / "small" / "small.hfq") as file, open_backend("cpu") as backend:
        verify(file, backend, inputs_of(file, VerifyOptions(generate=0))).raise_if_failed()


def test_a_whole_kit_has_every_tier_at_full_width_and_stays_small() -> None:
    models = kit_models()
    assert {m.name for m in models if m.shape == FULL} == set(tiers())
    assert (FULL.hidden, FULL.width) == (3072, 1536)
    total = 0
    for model in models:
        for spec in inventory(parse_config(model.config())):
            name = "Q8F16" if len(spec.shape) > 1 else "F32"
            if spec.projection and spec.layer is not None:
                name = model.layers[spec.layer][spec.projection == "w2"]
            total += BY_NAME[name].nbytes(math.prod(spec.shape))
        for tokens in PROMPTS.values():
            rows = 2 * len(tokens) * len(model.layers) + len(FAULTS) * min(POSITIONS, len(tokens))
            total += 4 * (rows * model.shape.hidden + 2 * len(tokens) * 300)
    assert total + 2_000_000 < LIMIT  # the rest is metadata and single products


def test_a_model_has_other_formats_in_each_layer_and_a_layer_that_departs_is_named(tmp_path: Path) -> None:
    """As a file that is fitted to a size. An engine that goes by the formats of the first layer is found out."""
    with open_backend("cpu") as backend:
        write_kit(tmp_path / "kit", backend, [MIXED], FORMATS)
        checked = check_kit(tmp_path / "kit", tmp_path / "results", backend)
    assert not checked.judgement.findings
    with open_hfq(tmp_path / "kit" / "mixed" / "mixed.hfq") as file:
        formats = [[file.entry(expert_name(n, 0, p)).quant_type for p in ("w1", "w2")] for n in range(3)]
    assert formats == [[BY_NAME[name].quant_type for name in pair] for pair in MIXED.layers]
    dump = tmp_path / "results" / "mixed.one.hfhs"
    states = np.frombuffer(dump.read_bytes()[24:], "<f4").reshape(3, 1, 256).copy()
    states[1:] = states[:1]
    dump.write_bytes(dump.read_bytes()[:24] + states.tobytes())
    (finding,) = judge(tmp_path / "kit", tmp_path / "results").findings
    assert "layer 1 departs" in finding.problem and "down in MQ6, unlike theirs" in finding.problem


def test_nothing_is_replaced_but_a_kit(kit: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    with open_backend("cpu") as backend:
        with pytest.raises(OutputError, match="exists already"):
            write_kit(kit, backend, [SMALL], ["MQ4"])
        with pytest.raises(OutputError, match="is no kit"):
            write_kit(tmp_path / "precious", backend, [SMALL], ["MQ4"], force=True)
        (tmp_path / "file").write_text("x")
        with pytest.raises(OutputError):
            write_kit(tmp_path / "file" / "kit", backend, [SMALL], ["MQ4"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "precious"]


def test_the_readme_names_models_faults_and_what_is_known_of_the_engine(kit: Path) -> None:
    text = (kit / "README.md").read_text()
    assert "{{" not in text and "`small` | MQ4 | MQ4 | 512 | 1280 | 3 | 2 |" in text
    for fault in FAULTS:
        assert f"**{fault.id}**" in text
    assert "ec9ec35e" in text


@pytest.mark.parametrize(
    "broken", ["no folder", "kit.json", "small/small.hfq", "vectors.bin", "small/one.hfhs"]
)
def test_a_kit_with_a_hole_is_refused(broken: str, kit: Path, tmp_path: Path) -> None:
    copy = tmp_path / "kit"
    if broken != "no folder":
        shutil.copytree(kit, copy)
        (copy / broken).unlink()
    with open_backend("cpu") as backend, pytest.raises(Exception, match="kit") as e:
        check_kit(copy, tmp_path / "results", backend)
    assert isinstance(e.value, BrokenKitError) or "small.hfq" in str(e.value)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(args)
    except SystemExit as e:
        code = int(e.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_checks_a_kit(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    code, out, _ = run(capsys, "kit", "--check", str(kit), "--backend", "cpu", "--results", str(results))
    assert code == 0 and "7 results judged, all are right" in out
    assert (results / "small.eight.hfhs").is_file()
    code, out, _ = run(capsys, "kit", "--check", str(kit), "--backend", "cpu", "--json")
    assert code == 0 and json.loads(out)["ok"] is True
    for args in ((), ("--out", "a", "--check", "b"), ("--out", "a", "--results", "b")):
        code, _, err = run(capsys, "kit", *args)
        assert code == 2 and ("give either" in err or "goes with" in err)


def test_compare_hidden_names_the_fault(
    kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, dump = kit / "small" / "one.hfhs", tmp_path / "engine.hfhs"
    raw = expected.read_bytes()
    dump.write_bytes(raw[:24] + (kit / "small" / "one.down-512.f32").read_bytes())
    code, out, err = run(capsys, "compare-hidden", str(expected), str(dump), "--json")
    assert code == 1 and not json.loads(out)["ok"]
    for pair in ((expected, dump), (dump, expected)):
        code, _, err = run(capsys, "compare-hidden", *map(str, pair), "--bar", "0.1")
        assert code == 1 and "down: only the first 512 columns of a row are added up" in err
    code, _, _ = run(capsys, "compare-hidden", str(expected), str(kit / "small" / "one.kernels.hfhs"))
    assert code == 0
