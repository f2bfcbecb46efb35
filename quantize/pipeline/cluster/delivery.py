"""How payloads get from a worker into the output, without passing Ray's object store.

Where the worker sees the output's folder, it writes into the unfinished file, at the place that the plan gives. Whether
it does, a marker file beside the output tells: the driver has written random bytes there. Everywhere else the worker
sends payloads to the driver over a connection of its own, which both ends prove with the same bytes.
"""

from __future__ import annotations

import os
import secrets
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Protocol

from ....formats.errors import ClusterError, MqError
from ....formats.own_file import disk_errors, open_own, sync, write_all
from ...write.partial_file import MARKER

OFFSET = struct.Struct("<Q")
"""What precedes a payload on a connection: its place in the output."""


@dataclass(frozen=True)
class Target:
    """The unfinished file that payloads go to, the secret of its marker, and where the driver listens."""

    path: str
    secret: bytes = field(repr=False)
    address: tuple[str, int]


class Sink(Protocol):
    """Takes payloads for places of the output."""

    def put(self, offset: int, payload: memoryview) -> None:
        """Take a payload; it may be read by others after `sync` alone."""
        ...

    def sync(self) -> None:
        """Wait until everything that was put is where the driver reads it."""
        ...


class SharedFile:
    """Writes into the output's unfinished file itself."""

    def __init__(self, path: Path) -> None:
        self._path, self._fd = path, open_own(path)

    def put(self, offset: int, payload: memoryview) -> None:
        """As `Sink.put`."""
        with disk_errors(self._path):
            write_all(self._fd, payload, offset)

    def sync(self) -> None:
        """As `Sink.sync`."""
        with disk_errors(self._path):
            sync(self._fd)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)


class ToDriver:
    """Sends payloads to the driver, which answers each one when it is written."""

    def __init__(self, target: Target) -> None:
        """Raises ClusterError where the driver cannot be reached."""
        self._address = "{}:{}".format(*target.address)
        with self._faults():
            self._connection = Client(target.address, authkey=target.secret)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, AuthenticationError) as e:
            raise ClusterError(
                f"sees neither the output's folder nor the driver at {self._address}: {e or 'it hung up'}",
                hint="put the output on a file system that all nodes share, or open the driver's ports to them",
            ) from None

    def put(self, offset: int, payload: memoryview) -> None:
        """As `Sink.put`."""
        with self._faults():
            self._connection.send_bytes(OFFSET.pack(offset))
            self._connection.send_bytes(payload)
            self._connection.recv_bytes()

    def sync(self) -> None:
        """Every payload has been answered already."""

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


@contextmanager
def open_sink(target: Target) -> Iterator[Sink]:
    """The way from this process into the output."""
    path = Path(target.path)
    sink = SharedFile(path) if _is_shared(path, target.secret) else ToDriver(target)
    try:
        yield sink
    finally:
        sink.close()


def marker_of(path: Path) -> Path:
    """The marker beside an unfinished file."""
    return path.with_name(path.name + MARKER)


def _is_shared(path: Path, secret: bytes) -> bool:
    """Whether the file of this name is the driver's."""
    with suppress(OSError):
        return secrets.compare_digest(marker_of(path).read_bytes(), secret)
    return False


@contextmanager
def receiving(
    path: Path, host: str, write: Callable[[int, bytes], None], shared: bool = True
) -> Iterator[Target]:
    """Offer both ways into the unfinished file at `path` until the end of the block; `write(offset, payload)` is called
    on threads of its own. Without `shared` nobody is told of the file.

    Raises OutputError where the marker cannot be written, ClusterError where nobody may listen on `host`.
    """
    secret, marker = secrets.token_bytes(32), marker_of(path)
    if shared:
        fd = open_own(marker)
        with disk_errors(marker):
            os.ftruncate(fd, 0)
            write_all(fd, memoryview(secret))
            sync(fd)
        os.close(fd)
    try:
        with _listening(host, secret, write) as address:
            yield Target(str(path.absolute()), secret, address)
    finally:
        if shared:
            with suppress(OSError):
                marker.unlink()


@contextmanager
def _listening(host: str, secret: bytes, write: Callable[[int, bytes], None]) -> Iterator[tuple[str, int]]:
    """Accept connections of those who know the secret."""
    try:
        listener = Listener((host, 0))
    except OSError as e:
        raise ClusterError(f"the driver cannot listen on {host}: {e.strerror or e}") from None
    over = threading.Event()

    def accept() -> None:
        while not over.is_set():
            with suppress(OSError):
                connection = listener.accept()
                threading.Thread(target=_serve, args=(connection, secret, write), daemon=True).start()

    thread = threading.Thread(target=accept, name="payloads", daemon=True)
    thread.start()
    address = listener.address
    assert isinstance(address, tuple)
    try:
        yield address
    finally:
        over.set()
        with suppress(OSError):
            Client(address).close()
        thread.join()
        listener.close()


def _serve(connection: Connection, secret: bytes, write: Callable[[int, bytes], None]) -> None:
    """Write what one worker sends that knows the secret; hang up on an error, which the worker reports."""
    with connection, suppress(OSError, EOFError, AuthenticationError, MqError):
        deliver_challenge(connection, secret)
        answer_challenge(connection, secret)
        while True:
            (offset,) = OFFSET.unpack(connection.recv_bytes(OFFSET.size))
            write(offset, connection.recv_bytes())
            connection.send_bytes(b"")
