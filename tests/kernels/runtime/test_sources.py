"""Signatures are read from the sources as the compiler reads them, and every module's text is whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mq_quant.formats.blocks import BY_NAME
from mq_quant.formats.errors import BackendError
from mq_quant.kernels.runtime.host import open_backend
from mq_quant.kernels.runtime.sources import Module, Sources, signatures


def test_every_kernel_of_the_sources_is_found():
    sources = Sources()
    plain = {name for name, fmt in sources.kernels if fmt is None}
    assert plain == {
        *("rmsnorm", "rope", "scale_rotate", "silu_mul_rotate", "add", "combine", "router_top_k"),
        *("kv_append", "attention"),
        *(
            "rotate_rows",
            "multiply_rows",
            "widen_codes",
            "answer_errors",
            "answer_rows",
            "diagonal_hessian",
        ),
        *("dense_sums", "spread_levels_f32", "level_gradients_f32"),
        *("spread_levels_bf16", "level_gradients_bf16"),
    }
    books, grids = ("MQ2-Lloyd", "MQ3-Lloyd"), ("MQ4", "MQ6")
    per_format = {
        tuple(BY_NAME): (
            "decode",
            "embed",
            "matvec",
            "expert_gate_up",
            "expert_down",
            "expert_activated_down",
        ),
        books: ("kmeans_pairs", "kmeans_exact"),
        grids: ("affine_levels",),
        books + grids: (
            *("feedback", "descend", "refit", "begin_again", "refit_dense"),
            *(
                "round_levels",
                "nearest",
                "residual_rows",
                "decoded_rows",
                "keep_better",
                "apply_gain",
                "pack",
            ),
        ),
    }
    expected = {(n, f) for formats, names in per_format.items() for n in names for f in formats}
    assert {key for key in sources.kernels if key[1]} == expected
    written = sum(path.read_text().count("\nKERNEL(") for path in sources.folder.rglob("*.hip"))
    assert written == len(plain) + sum(map(len, per_format.values()))


def test_a_signature_is_read_with_types_and_who_writes():
    text = "KERNEL(64) k(float* __restrict__ out, const uint8_t* x,\n    int64_t n, int m, float eps) {"
    [(name, threads, parameters, early)] = signatures(text, Path("k.hip"))
    assert (name, threads, early) == ("k", 64, None)
    assert [(p.name, p.ctype, p.dtype, p.written) for p in parameters] == [
        ("out", "float*", "float32", True),
        ("x", "const uint8_t*", "uint8", False),
        ("n", "int64_t", "int64", False),
        ("m", "int", "int32", False),
        ("eps", "float", "float32", False),
    ]


def test_what_a_kernel_reads_before_it_awaits_is_known_by_type():
    text = """
KERNEL(64) none(float* out, const int32_t* ids) {
  out[0] = ids[0];
}
KERNEL(64) first(float* out, const int32_t* ids) {
  await_previous();
  out[0] = ids[0];
}
KERNEL(64) later(float* out, const uint8_t* w, const int32_t* ids, const float* x, int n) {
  float* mine = out + n;
  if (ids[0] < n) {
    await_previous();
    return;
  }
  fetch(w);
  await_and_multiply(mine, x);
}
"""
    early = {name: types for name, _, _, types in signatures(text, Path("k.hip"))}
    assert early == {"none": None, "first": frozenset(), "later": {np.dtype("uint8"), np.dtype("int32")}}


def test_no_kernel_may_begin_before_what_writes_its_weights_or_ids_is_done():
    kernels = Sources().kernels.values()
    expert = next(k for k in kernels if k.name == "expert_gate_up")
    assert {k.name for k in kernels if expert.early & k.written} >= {"router_top_k", "pack"}
    assert not any(expert.early & k.written for k in kernels if k.name in ("scale_rotate", "silu_mul_rotate"))


@pytest.mark.parametrize("argument", ["double x", "float** x", "unsigned n", "const float& x", "float"])
def test_an_argument_that_launches_cannot_check_is_refused(argument):
    with pytest.raises(BackendError, match="launches cannot check"):
        signatures(f"KERNEL(32) k({argument}) {{", Path("k.hip"))


def test_our_headers_are_put_in_once(tmp_path):
    (tmp_path / "a.h").write_text('#pragma once\n#include "b.h"\nA\n')
    (tmp_path / "b.h").write_text("#pragma once\nB\n")
    (tmp_path / "k.hip").write_text('#include "a.h"\n#include "b.h"\n#include <hip/hip_runtime.h>\nK\n')
    assert Sources(tmp_path).text("k.hip") == "B\nA\n#include <hip/hip_runtime.h>\nK\n"


def test_sources_name_no_intrinsic_that_the_rules_forbid():
    sources = Sources()
    for module in sources.modules():
        text = sources.text(module.file)
        for forbidden in ("atomicAdd", "asm", "powf", "sinf", "cosf", "__shared__ float", "warpSize"):
            assert f"{forbidden}(" not in text.replace("#define LDS", "")


def test_a_missing_header_is_an_error(tmp_path):
    (tmp_path / "k.hip").write_text('#include "nowhere.h"\n')
    with pytest.raises(BackendError, match=r"nowhere\.h: a kernel source cannot be read"):
        Sources(tmp_path).text("k.hip")


def test_one_kernel_defined_twice_is_refused(tmp_path):
    for name in ("a.hip", "b.hip"):
        (tmp_path / name).write_text('#include "device.h"\nKERNEL(32) k(int n) {}\n')
    with pytest.raises(BackendError, match="kernel k is defined twice"):
        Sources(tmp_path).kernel("k")


def test_a_signature_that_the_compiler_reads_otherwise_does_not_build(tmp_path):
    (tmp_path / "k.hip").write_text(
        '#include "device.h"\n#define int int64_t\nKERNEL(32) k(int n, float* out) { out[0] = (float)n; }\n#undef int\n'
    )
    sources = Sources(tmp_path)
    with open_backend("cpu", sources=sources, threads=1) as cpu:
        out = cpu.upload(np.zeros(1, np.float32))
        with pytest.raises(BackendError, match="signature of k"):
            cpu.launch(cpu.kernel("k"), (1,), (32,), (3, out))


def test_a_format_becomes_a_struct_name():
    assert Module("matrix.hip", "MQ2-Lloyd").defines == ("FORMAT=MQ2_Lloyd",)
    assert Module("vector.hip").defines == ()
