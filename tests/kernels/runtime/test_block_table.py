"""Kernels have their numbers from Python's tables: as the compiler reads them, and nowhere a second time."""

from __future__ import annotations

import re

import numpy as np
import pytest
from mq_quant.formats.blocks import BY_NAME, AffineFormat
from mq_quant.kernels.encode import geometry as encode_geometry
from mq_quant.kernels.forward import geometry as forward_geometry
from mq_quant.kernels.runtime import block_table
from mq_quant.kernels.runtime.host import open_backend
from mq_quant.kernels.runtime.sources import FOLDER, INCLUDE, Sources

TABLES = {
    "block_table.h": block_table.CONSTANTS,
    "encode_constants.h": encode_geometry.CONSTANTS,
    "forward_constants.h": forward_geometry.CONSTANTS,
}
FIELDS = ("BYTES", "BLOCK", "BLOCK_WEIGHTS", "HEAD", "VALUE", "BITS", "LEVELS", "SLICE", "ROWS", "GRID")


def read_by_the_compiler(folder, names, include):
    """The bits, as f64, of what the CPU's compiler takes each name for."""
    lines = "".join(f"  out[{i}] = (double)({name});\n" for i, name in enumerate(names))
    (folder / "k.hip").write_text(
        f'#include "device.h"\n#include "{include}"\nKERNEL(WAVE) k(double* out) {{\n{lines}}}\n'
    )
    with open_backend("cpu", sources=Sources(folder), threads=1) as cpu:
        out = cpu.upload(np.zeros(len(names)))
        kernel = cpu.kernel("k")
        assert kernel.threads == block_table.WAVE
        cpu.launch(kernel, (1,), (32,), (out,))
        return cpu.download(out)


@pytest.mark.parametrize("header", TABLES)
def test_the_compiler_reads_the_numbers_of_the_tables_bit_for_bit(header, tmp_path):
    constants = TABLES[header]
    got = read_by_the_compiler(tmp_path, list(constants), header)
    np.testing.assert_array_equal(got, [float(value) for value in constants.values()])


def test_the_compiler_reads_the_block_formats_as_blocks_py_has_them(tmp_path):
    names = [f"blocks::{name.replace('-', '_')}::{field}" for name in BY_NAME for field in FIELDS]
    got = read_by_the_compiler(tmp_path, names, "block_table.h").reshape(len(BY_NAME), len(FIELDS))
    for fmt, row in zip(BY_NAME.values(), got, strict=True):
        found = dict(zip(FIELDS, row, strict=True))
        assert found["BYTES"] == fmt.nbytes(256)
        assert (found["BLOCK"], found["BLOCK_WEIGHTS"]) == (fmt.group_bytes, fmt.group)
        assert found["LEVELS"] == fmt.levels == (2 ** found["BITS"] if fmt.levels else 0)
        assert found["HEAD"] + fmt.group * found["BITS"] / 8 == (fmt.group_bytes if fmt.levels else 0)
        assert found["VALUE"] == (0 if fmt.levels else fmt.group_bytes)
        assert found["GRID"] == isinstance(fmt, AffineFormat)


def test_constants_keep_their_type():
    text = block_table.declare({"A": 3, "B": np.float32(1e-3), "C": 1e-3})
    assert text == (
        f"constexpr int A = 3;\nconstexpr float B = {float(np.float32(1e-3)).hex()}f;\n"
        f"constexpr double C = {(1e-3).hex()};\n"
    )


def code_of(path):
    """A source without comments, strings and the text of assembler."""
    text = re.sub(r'"(?:[^"\\]|\\.)*"', '""', path.read_text(encoding="utf-8"))
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def test_no_kernel_repeats_a_size_that_the_tables_hold():
    """Groups of 256, the bytes of a block, and the encoder's shares and floors."""
    sizes = {256, *(f.group_bytes for f in BY_NAME.values()), *(f.nbytes(256) for f in BY_NAME.values())}
    whole = "|".join(str(n) for n in sorted(sizes) if n > 64)
    bare = re.compile(rf"\b({whole})(?:\.0f?|u|f)?\b|\b(?:1e38f|1e-3f|1e-4f|0\.01f|65504\.0f|1e-12)\b")
    files = [p for suffix in ("*.hip", "*.h") for p in FOLDER.rglob(suffix)]
    assert len(files) > 12
    found = {f"{p.relative_to(FOLDER)}: {m[0]}" for p in files for m in bare.finditer(code_of(p))}
    assert not found


def test_made_headers_are_no_files():
    names = {p.name for p in FOLDER.rglob("*.h")}
    assert not names & set(TABLES)
    assert INCLUDE.is_dir()


def test_a_number_of_threads_that_no_header_has_is_refused(tmp_path):
    (tmp_path / "k.hip").write_text('#include "device.h"\nKERNEL(PLENTY) k(int n) {}\n')
    with pytest.raises(Exception, match=r"k\.hip: no header gives the number of threads 'PLENTY'"):
        Sources(tmp_path).kernel("k")
