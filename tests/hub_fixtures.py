"""A small checkpoint, a hub on loopback that serves it, and sources opened on that; nothing else can be reached."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import hub_server
import numpy as np
import pytest
import small_model
from hub_server import MAIN, REPO, HubServer
from huggingface_hub import constants
from mq_quant.formats.checkpoint.local import Checkpoint, open_checkpoint
from mq_quant.formats.checkpoint.source import Source
from mq_quant.formats.checkpoint.streamed import HubCheckpoint, open_hub
from mq_quant.formats.hub.client import Hub
from mq_quant.formats.minimax import inventory

SHARDS = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
INDEX = "model.safetensors.index.json"
NOWHERE = "http://127.0.0.1:9"
"""What stands in for the public hub, so that no request can leave this machine."""


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(
        small_model.save(tmp_path_factory.mktemp("m") / "m", small_model.tensors(), shards=4)
    )


@pytest.fixture
def server(local: Checkpoint, isolated: None) -> Iterator[HubServer]:
    with hub_server.serve({REPO: {MAIN: hub_server.repository(local.path)}}) as hub:
        yield hub


@pytest.fixture
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of huggingface_hub's, and none of the environment's settings."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    template = NOWHERE + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses"), raising=False)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


Opener = Callable[..., HubCheckpoint]


@pytest.fixture
def opened(server: HubServer, tmp_path: Path) -> Iterator[Opener]:
    sources: list[Source] = []

    def make(shard_cache: int = 2, revision: str | None = None) -> HubCheckpoint:
        hub = Hub(server.endpoint, pause=0.001)
        source = open_hub(REPO, revision, shard_cache, scratch=tmp_path / "scratch", hub=hub)
        assert isinstance(source, HubCheckpoint)
        sources.append(source)
        return source

    yield make
    for source in sources:
        source.close()
    assert not list((tmp_path / "scratch").glob("*")), "the scratch folder is not removed"


def names(source: Source) -> list[str]:
    return [spec.name for spec in inventory(source.config)]


def stored(scratch: Path) -> int:
    """Bytes of the files under a folder; what is renamed or deleted while they are counted holds none."""
    return sum(size(path) for path in scratch.rglob("*"))


def size(path: Path) -> int:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def read_all(source: Source, local: Checkpoint, order: list[str]) -> None:
    source.schedule(order)
    for name in order:
        assert np.array_equal(source.weight(name), local.weight(name)), name
        source.release(name)
