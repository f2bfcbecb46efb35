"""How many threads numpy's and scipy's BLAS may take under workers, which have the cores already.

Depends on threadpoolctl.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from threadpoolctl import ThreadpoolController


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Products and factorisations take one thread each in the whole process: with more their bits are others.

    The BLAS that torch may bring keeps its threads. Not for blocks that overlap: the first to end gives all back.
    """
    libraries = [
        (library, library.num_threads)
        for library in ThreadpoolController().lib_controllers
        if library.user_api == "blas" and not {"torch", "torch.libs"} & set(Path(library.filepath).parts)
    ]
    try:
        for library, _ in libraries:
            library.set_num_threads(1)
        yield
    finally:
        for library, before in libraries:
            library.set_num_threads(before)
