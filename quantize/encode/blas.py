"""One thread for each product and factorisation of numpy and scipy: the workers have the machine's cores already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
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
        if library.user_api == "blas" and not _is_of_torch(Path(library.filepath))
    ]
    try:
        for library, _ in libraries:
            library.set_num_threads(1)
        yield
    finally:
        for library, before in libraries:
            library.set_num_threads(before)


def _is_of_torch(library: Path) -> bool:
    """Whether a library came with torch. Its path alone does not say that: a whole environment may lie in a folder of
    the name torch.
    """
    found = find_spec("torch")
    if found is None or found.origin is None:
        return False
    package = Path(found.origin).resolve().parent
    return any(library.resolve().is_relative_to(home) for home in (package, package.with_name("torch.libs")))
