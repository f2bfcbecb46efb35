"""Builds: the same bytes in every way of running them, nothing half-written, and resuming only what holds."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_hooks import Begun, stopped
from mq_quant.formats.blocks import FORMATS
from mq_quant.formats.errors import CheckpointError, ImatrixError, OutputError, RecipeError, ResumeError
from mq_quant.formats.hfq import open_hfq, quantization_hash
from mq_quant.quantize.pipeline.build import BuildResult
from mq_quant.quantize.pipeline.statistics import ImatrixFile, NoStatistics
from mq_quant.quantize.pipeline.work_units import WorkUnit
from mq_quant.quantize.pipeline.worker_pool import AHEAD
from mq_quant.quantize.write.partial_file import JOURNAL, PARTIAL
from small_imatrix import save_imatrix

Run = Callable[..., BuildResult]
PLAIN = {"statistics": NoStatistics(), "alpha": None}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_is_whole_and_says_what_it_is(run: Run, tmp_path: Path) -> None:
    result = run("out.mq2")
    assert names(tmp_path) == ["out.mq2"]
    with open_hfq(tmp_path / "out.mq2") as file:
        assert quantization_hash(file) == result.quantization_hash
        recorded = file.metadata["quantization_hash"]
        assert recorded["value"] == result.quantization_hash
        assert (recorded["tensor_count"], len(file.entries)) == (result.tensor_count,) * 2
        ours = file.metadata["mq_quant"]
        assert [layer["layer"] for layer in ours["layers"]] == [0, 1]
        assert len(ours["checksums"]["values"]) == 16 * len(file.entries)
        assert file.metadata["parameter_counts"]["moe"]["routed_active_fraction"] == {
            "numerator": 2,
            "denominator": 3,
        }
        assert str(tmp_path) not in file.metadata_bytes.decode()


def test_any_number_of_jobs_gives_the_same_file(run: Run, tmp_path: Path) -> None:
    for jobs in (1, 2, 5):
        run(f"{jobs}", jobs=jobs, alpha=None)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes() == (tmp_path / "5").read_bytes()


@pytest.mark.parametrize("count", [0, 1, 7, 20, 28])
def test_an_interrupted_build_continues_to_the_same_file(run: Run, tmp_path: Path, count: int) -> None:
    whole = run("whole")
    with stopped(count) as hook:
        run("broken", on_begin=hook)
    assert "broken" not in names(tmp_path)
    begun = Begun()
    result = run("broken", on_begin=begun)
    assert (tmp_path / "broken").read_bytes() == (tmp_path / "whole").read_bytes()
    assert names(tmp_path) == ["broken", "whole"]
    assert result.resumed_units + len(begun.units) == whole.units
    assert result.resumed_units <= count <= result.resumed_units + AHEAD * 2 + 1


def interrupted(run: Run, count: int = 15) -> None:
    with stopped(count) as hook:
        run("out", on_begin=hook)


def test_bytes_that_changed_since_are_encoded_again(run: Run, tmp_path: Path) -> None:
    run("whole")
    interrupted(run)
    partial = tmp_path / f"out{PARTIAL}"
    data = bytearray(partial.read_bytes())
    with open_hfq(tmp_path / "whole") as file:
        data[file.entry("model.layers.0.self_attn.q_proj.weight").offset + 100] ^= 1
    partial.write_bytes(data)
    begun = Begun()
    run("out", on_begin=begun)
    assert "model.layers.0.self_attn.q_proj.weight" in begun.keys
    assert "model.embed_tokens.weight" not in begun.keys
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("cut", [1, 30, 10**4])
def test_a_torn_journal_costs_only_its_torn_part(run: Run, tmp_path: Path, cut: int) -> None:
    run("whole")
    interrupted(run)
    journal = tmp_path / f"out{JOURNAL}"
    journal.write_bytes(journal.read_bytes()[:-cut])
    run("out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_partial_file_without_its_journal_is_not_trusted(run: Run, tmp_path: Path) -> None:
    interrupted(run)
    (tmp_path / f"out{JOURNAL}").unlink()
    assert run("out").resumed_units == 0


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"tier": "mq3"}, "recipe.tier"),
        ({"fit": "exact"}, "recipe.fit is 'hessian' there and 'exact' here"),
        ({"gain": False}, "recipe.gain"),
        ({"alpha": 0.5}, "recipe.awq.alpha"),
        (PLAIN, "imatrix"),
    ],
)
def test_another_job_is_refused_with_the_key_that_differs(
    run: Run, tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    interrupted(run)
    with pytest.raises(ResumeError) as caught:
        run("out", **changes)
    assert key in str(caught.value)
    assert "--restart" in str(caught.value)
    assert run("out", restart=True, **changes).resumed_units == 0


def test_another_source_is_refused_by_its_files(
    run: Run, tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(run)
    other = shutil.copytree(small, tmp_path / "elsewhere" / "small")
    shard = next(other.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ResumeError, match=rf"source\.files\.{shard.name}\.sha256"):
        run("out", source=other)


def test_an_output_that_exists_is_kept_until_the_new_one_is_whole(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(OutputError, match=r"exists already[\s\S]*--force"):
        run("out")
    with stopped(5) as hook:
        run("out", force=True, on_begin=hook)
    assert (tmp_path / "out").read_text() == "precious"
    run("out", force=True)
    assert (tmp_path / "out").stat().st_size > 1000


@pytest.mark.parametrize(
    ("call", "nth"), [("posix_fallocate", 1), ("pwrite", 1), ("pwrite", 12), ("fsync", 9)]
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_is_a_clear_error_and_leaves_nothing_under_the_final_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int, code: int
) -> None:
    run("whole")
    real, calls = getattr(os, call), 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(code, os.strerror(code))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(
            OutputError, match="disk is full" if code == errno.ENOSPC else "cannot be written"
        ):
            run("out")
    assert "out" not in names(tmp_path)
    run("out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_disk_that_is_too_small_is_found_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    begun = Begun()
    with pytest.raises(OutputError, match=r"its disk has 0\.0 GB free"):
        run("out", on_begin=begun)
    assert names(tmp_path) == []
    assert begun.units == []


def test_a_source_that_breaks_during_the_build_can_be_mended(run: Run, tmp_path: Path, small: Path) -> None:
    run("whole")
    broken = shutil.copytree(small, tmp_path / "moved" / "small")
    shard = sorted(broken.glob("*.safetensors"))[-1]
    data = shard.read_bytes()

    def cut(unit: WorkUnit) -> None:
        if unit.layer == 1:
            shard.write_bytes(data[: len(data) // 2])

    with pytest.raises(CheckpointError, match="changed after this command"):
        run("out", source=broken, on_begin=cut)
    assert "out" not in names(tmp_path)
    shard.write_bytes(data)
    assert run("out", source=broken).resumed_units > 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_second_build_of_the_same_output_is_refused(run: Run, tmp_path: Path) -> None:
    interrupted(run)
    import fcntl

    with (tmp_path / f"out{JOURNAL}").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another build"):
            run("out")
    run("out")


def test_a_build_that_did_nothing_leaves_nothing(run: Run, tmp_path: Path) -> None:
    interrupted(run, count=0)
    assert names(tmp_path) == []


def test_without_an_imatrix_the_file_says_so_and_has_no_scales(run: Run, tmp_path: Path) -> None:
    result = run("out", **PLAIN)
    assert result.coverage is None
    with open_hfq(tmp_path / "out") as file:
        assert file.metadata["mq_quant"]["imatrix"] is None
        assert file.metadata["mq_quant"]["recipe"]["fit"] == "exact"
        assert not any("awq_scale" in entry.name for entry in file.entries)
        assert [report["alpha"] for report in file.metadata["mq_quant"]["layers"]] == [0.0, 0.0]


def test_a_missing_imatrix_is_an_error(run: Run) -> None:
    with pytest.raises(ImatrixError, match="there is none of its own for this source"):
        run("out", statistics=None)


def test_an_imatrix_of_another_model_is_refused_before_any_work(run: Run, tmp_path: Path) -> None:
    for i, shape in enumerate([{"experts": 4}, {"width": 512}, {"layers": 1}]):
        other = save_imatrix(tmp_path / f"{i}.gguf", **shape)
        with pytest.raises(ImatrixError, match="another model"):
            run("out", statistics=ImatrixFile(other))
    assert not [name for name in names(tmp_path) if name.startswith("out")]


def test_broken_entries_of_an_imatrix_are_mended_and_reported(run: Run, tmp_path: Path) -> None:
    bad = save_imatrix(tmp_path / "bad.gguf", broken=True)
    result = run("out", statistics=ImatrixFile(bad))
    assert result.coverage < 1
    assert any("layer 1 w2" in note and "non-finite" in note for note in result.fallbacks)
    assert any("without tokens" in note for note in result.fallbacks)
    with open_hfq(tmp_path / "out") as file:
        reports = file.metadata["mq_quant"]["layers"]
        assert [note for layer in reports for note in layer["fallbacks"]] == list(result.fallbacks)
        for entry in file.entries:
            assert np.isfinite(FORMATS[entry.quant_type].decode(file.read(entry.name))).all()


@pytest.mark.parametrize("changes", [{"fit": "hessian"}, {"alpha": 0.5}])
def test_changes_that_need_statistics_contradict_their_absence(run: Run, changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="--no-imatrix"):
        run("out", **(PLAIN | changes))


def test_shards_in_another_order_give_the_same_payloads(run: Run, tmp_path: Path, small: Path) -> None:
    import small_model

    content = small_model.tensors()
    turned = small_model.save(tmp_path / "turned", dict(reversed(content.items())), shards=5)
    assert run("out", source=turned).quantization_hash == run("whole").quantization_hash


def test_the_file_is_not_tied_to_the_folder_of_its_source(run: Run, tmp_path: Path, small: Path) -> None:
    moved = shutil.copytree(small, tmp_path / "elsewhere" / "small")
    run("a")
    run("b", source=moved)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_metadata_carries_what_the_engine_needs(run: Run, tmp_path: Path, small: Path) -> None:
    other = shutil.copytree(small, tmp_path / "with-template")
    tokenizer = (small / "tokenizer.json").read_text() + "  \n"  # kept byte for byte
    (other / "tokenizer.json").write_text(tokenizer)
    (other / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    (other / "generation_config.json").write_text('{"top_p": 0.95}')
    (other / "chat_template.jinja").write_text("{{ messages }}")
    run("out", source=other)
    with open_hfq(tmp_path / "out") as file:
        assert file.metadata["tokenizer"] == tokenizer
        assert file.metadata["tokenizer_config"] == {"eos_token": "x", "chat_template": "{{ messages }}"}
        assert file.metadata["generation_config"] == {"top_p": 0.95}
        config = json.loads((small / "config.json").read_text())
        flat = {"use_qk_norm": True, "use_routing_bias": True, "scoring_func": "sigmoid", "rotary_dim": 64}
        assert (config | flat).items() <= file.metadata["config"].items()
