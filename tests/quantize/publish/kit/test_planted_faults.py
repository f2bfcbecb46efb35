"""Faults planted into the kernels: the kit names each of them, and none where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mq_quant.kernels.runtime.host import Backend, open_backend
from mq_quant.quantize.publish.kit.run import check_kit

from .conftest import Changes


def down(groups: str) -> Changes:
    """Expert down adds up only so many groups of a row, which is as long as before."""
    return {
        "feed.h": (
            ("  int rows, groups;\n  int first;", "  int rows, groups, whole;\n  int first;"),
            (
                "int line() const { return groups * Format::BYTES; }",
                "int line() const { return whole * Format::BYTES; }",
            ),
        ),
        "matrix.hip": (
            ("  share.groups = groups;\n", "  share.groups = share.whole = groups;\n"),
            (
                "  const Rows<Weights, MATRICES> share = share_of<MATRICES>(matrix, job.rows, job.groups);\n",
                "  Rows<Weights, MATRICES> share = share_of<MATRICES>(matrix, job.rows, job.groups);\n"
                "  const int groups = job.groups;\n"
                f"  if (MATRICES == 1) share.groups = {groups};\n",
            ),
        ),
    }


FAULTS: dict[str, Changes] = {
    "down-512": down("min(groups, 2)"),
    "down-1024": down("groups / 4 * 4"),
    "scale-ignored": {"vector.hip": (("x[at + j] / scale[column + j]", "x[at + j]"),)},
    "signs-swapped": {"rotate.h": (("  rotate(v, before, after);", "  rotate(v, after, before);"),)},
    "bias-in-weight": {
        "vector.hip": (
            (
                "1.0f / (1.0f + expf(-row[best_id])) : not",
                "1.0f / (1.0f + expf(-row[best_id])) + bias[best_id] : not",
            ),
        )
    },
    "norm-per-head": {
        "vector.hip": (
            (
                "  const float scale = 1.0f / sqrtf(block_sum(squares, scratch) / (float)n + eps);\n",
                "  float scale = 1.0f / sqrtf(block_sum(squares, scratch) / (float)n + eps);\n"
                "  if (n == 256) {\n"
                "    squares = 0.0f;\n"
                "    for (int i = 0; i < 128; i++) {\n"
                "      const float value = row[threadIdx.x / 128 * 128 + i];\n"
                "      squares = fmaf(value, value, squares);\n"
                "    }\n"
                "    scale = 1.0f / sqrtf(squares / 128.0f + eps);\n"
                "  }\n",
            ),
        )
    },
}


def test_kernels_without_faults_pass(kit: Path, tmp_path: Path) -> None:
    with open_backend("cpu") as backend:
        found = check_kit(kit, tmp_path, backend).judgement
    assert found.findings == () and found.missing == () and len(found.judged) == 7


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(
    fault: str, kit: Path, planted: Callable[[Changes], Backend], tmp_path: Path
) -> None:
    with planted(FAULTS[fault]) as backend:
        found = check_kit(kit, tmp_path / "results", backend).judgement
    assert found.named == (fault,), found.findings
    hidden = [f for f in found.findings if "departs" in f.problem]
    assert hidden and all(f.faults == (fault,) for f in hidden)


@pytest.mark.parametrize(
    ("fault", "columns", "said"),
    [
        ("down-512", 768, "columns 512 to 767 are left out"),
        ("down-512", 3072, "columns 512 to 3071 are left out"),
        ("down-1024", 1536, "columns 1024 to 1535 are left out"),
        ("down-1024", 256, "columns 0 to 255 are left out"),
    ],
)
def test_products_tell_the_columns(
    fault: str, columns: int, said: str, kit: Path, planted: Callable[[Changes], Backend], tmp_path: Path
) -> None:
    with planted(FAULTS[fault]) as backend:
        found = check_kit(kit, tmp_path / "results", backend).judgement
    told = {f.where: f.problem for f in found.findings}
    assert said in told[f"down in MQ4, {columns} columns"]
    assert not any(where.startswith(("gate-up", "matvec")) for where in told)
