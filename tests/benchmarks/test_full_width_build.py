"""The checkpoint that whole builds are measured on is one that a build takes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import full_width_build

NARROW = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "vocab_size": 300,
}


def test_a_build_takes_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_width_build, "POOL", 1 << 17)
    source = tmp_path / "source"
    source.mkdir()
    full_width_build.write_checkpoint(source, 1, 2, **NARROW)
    given = argparse.Namespace(tier="mq2-lloyd", jobs=1, device="cpu", layers=1, experts=2)
    full_width_build.build(given, source, "imatrix", tmp_path / "out.hfq")
    assert "weights/s" in capsys.readouterr().out
