"""The CPU back end with what only NVIDIA's header has: tiles of bits and of bytes, made of shuffles, and copies into
LDS, made as late as they may be."""

from __future__ import annotations

from pathlib import Path

from mq_quant.kernels.runtime.cpu import CpuBackend
from mq_quant.kernels.runtime.cuda import CudaBackend
from mq_quant.kernels.runtime.sources import Sources

HEADERS = Path(__file__).parent / "kernels" / "forward"
FORMATS = tuple(CudaBackend.counted)
"""The formats whose products count bits."""


class CountingBackend(CpuBackend):
    slices = CudaBackend.counted
    multiprocessors = 3
    most_lds = 0

    def lds_for_copies(self, kernel):
        return self.most_lds


def counting(folder, order, *, copies=False):
    """A back end whose device.h, in `folder`, is followed by the headers of bits and, if asked, of copies."""
    names = ("bits_on_cpu.h", "copies_on_cpu.h") if copies else ("bits_on_cpu.h",)
    for name in ("matrix.hip", "vector.hip"):
        (folder / name).write_text((Sources().path(name)).read_text())
    included = "".join(f'\n#include "{name}"\n' for name in names)
    (folder / "device.h").write_text((Sources().path("device.h")).read_text() + included)
    for name in names:
        (folder / name).write_text((HEADERS / name).read_text())
    return CountingBackend(sources=Sources(folder), order=order)
