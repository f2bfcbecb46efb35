"""One thread for each product and factorisation of numpy and scipy: the workers have the machine's cores already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from threadpoolctl import ThreadpoolController


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """In the whole process, BLAS takes one thread for each product and factorisation: with more, the bits are others.

    The BLAS that torch may bring keeps its threads. Two such blocks may not overlap in time, since the first that ends
    gives all threads back.
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
