"""A kit of one small model, made once, and kernels with faults planted into their sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from mq_quant.kernels.runtime.host import Backend, open_backend
from mq_quant.kernels.runtime.sources import FOLDER, Sources
from mq_quant.quantize.publish.kit.make import write_kit
from mq_quant.quantize.publish.kit.shapes import KitModel, Shape

SMALL = KitModel("small", Shape(512, 1280, 3, 2), (("MQ4", "MQ4"),))
FORMATS = ("MQ4", "Q8F16")
Changes = Mapping[str, tuple[tuple[str, str], ...]]
"""Of each source file, pieces of text and what stands in their place."""


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits") / "kit"
    with open_backend("cpu") as backend:
        write_kit(folder, backend, [SMALL], FORMATS)
    return folder


@pytest.fixture
def planted(tmp_path: Path) -> Callable[[Changes], Backend]:
    """Opens the CPU back end with kernels that were changed."""

    def open_changed(changes: Changes) -> Backend:
        folder = tmp_path / "kernels"
        folder.mkdir()
        for name in ("matrix.hip", "vector.hip", "attention.hip", "feed.h", "rotate.h"):
            text = (FOLDER / "forward" / name).read_text()
            for before, after in changes.get(name, ()):
                assert before in text, before
                text = text.replace(before, after)
            (folder / name).write_text(text)
        return open_backend("cpu", sources=Sources(folder))

    return open_changed
