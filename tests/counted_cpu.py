"""The CPU back end with what only NVIDIA's header has: tiles of bits, made of shuffles, and copies into LDS, made as
late as they may be."""

from __future__ import annotations

from pathlib import Path

from mq_quant.kernels.cpu import CpuBackend
from mq_quant.kernels.cuda import CudaBackend
from mq_quant.kernels.sources import FOLDER, Sources

HEADERS = Path(__file__).parent / "kernels"
FORMATS = tuple(CudaBackend.counted)
"""The formats whose products count bits."""


class CountingBackend(CpuBackend):
    slices = CudaBackend.counted
    most_lds = 0

    def lds_for_copies(self, kernel):
        return self.most_lds


def counting(folder, order, *, copies=False):
    """A back end whose device.h, in `folder`, is followed by the headers of bits and, if asked, of copies."""
    names = ("bits_on_cpu.h", "copies_on_cpu.h") if copies else ("bits_on_cpu.h",)
    (folder / "matrix.hip").write_text((FOLDER / "matrix.hip").read_text())
    included = "".join(f'\n#include "{name}"\n' for name in names)
    (folder / "device.h").write_text((FOLDER / "device.h").read_text() + included)
    for name in names:
        (folder / name).write_text((HEADERS / name).read_text())
    return CountingBackend(sources=Sources(folder), order=order)
