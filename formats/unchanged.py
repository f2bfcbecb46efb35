"""Files that a long run reads again and again, and that must stay as they were.

The hash of such a file goes into the provenance at the beginning, and its bytes are used hours later. `UnchangedFile`
makes both speak of the same bytes: it compares the file's state before and after every use, and where only the state
differs (another mode, another hard link), the hash decides. Nothing is mapped, so a file that shrinks is an error and
does not end the process.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from .errors import MqError
from .plain_file import hint_of
from .watch import UNWATCHED, Watch

ATTEMPTS = 3
"""A use during which the file's state changed is repeated as often as this, and then refused."""

_BLOCK = 4 << 20

T = TypeVar("T")
Look = Callable[[bytes], None]
"""Is shown the pieces of a file in order."""


@dataclass(frozen=True)
class FileState:
    """What the file system says of a file; whoever writes to the file or replaces it changes one of these.

    `changed_ns` (ctime) also tells of new bytes whose writer has set `modified_ns` back.
    """

    size: int
    modified_ns: int
    changed_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, file: BufferedReader | Path) -> FileState:
        """The state of an open file or of a path; OSError where there is none."""
        s = file.stat() if isinstance(file, Path) else os.fstat(file.fileno())
        return cls(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev)

    def same_content(self, other: FileState) -> bool:
        """Whether size, time of the last write and inode are equal: all that can be asked without a hash."""
        return (self.size, self.modified_ns, self.inode, self.device) == (
            other.size,
            other.modified_ns,
            other.inode,
            other.device,
        )


@dataclass(frozen=True)
class KnownHash:
    """The hash of a file's bytes, and the state that the file had when they were hashed, perhaps on another machine."""

    state: FileState
    sha256: str

    def as_record(self) -> dict[str, Any]:
        """What a provenance holds of the file."""
        return {"bytes": self.state.size, "sha256": self.sha256}


class UnchangedFile:
    """A plain file whose state is noted now, and compared at every use. Safe for several threads.

    `error` is the class of what is raised, and the message names the file. It is raised where the file cannot be read,
    and where it has changed: before `sha256` or `content` was called, on another size, time of the last write or inode;
    afterwards, on another hash. `hint` is what to do where the file cannot be read.
    """

    def __init__(self, path: Path, error: type[MqError], hint: str | None = None) -> None:
        self.path, self._error, self._hint = path, error, hint
        self._lock = threading.Lock()
        self._sha256: str | None = None
        self._is_believed = False
        try:
            self._state = FileState.of(path)
            plain = path.is_file()
        except OSError as e:
            raise self._unreadable(e) from None
        if not plain:  # a pipe can be read only once, and opening one may wait for ever
            raise error("is not a plain file", file=path, hint=hint)

    @property
    def size(self) -> int:
        """The file's bytes."""
        return self._state.size

    def read(self, use: Callable[[BufferedReader], T]) -> T:
        """What `use` makes of the open file, which was the same before and after; `use` may be called again."""
        try:
            with self.path.open("rb") as file:
                for _ in range(ATTEMPTS):
                    before = FileState.of(file)
                    self._accept(file, before)
                    file.seek(0)
                    try:
                        value = use(file)
                    except MqError:
                        if FileState.of(file) == before:
                            raise
                    else:
                        if FileState.of(file) == before:
                            return value
        except OSError as e:
            raise self._unreadable(e) from None
        raise self._changed()

    def sha256(self, watch: Watch = UNWATCHED, look: Callable[[], Look] | None = None) -> str:
        """The hash of the file's bytes, 64 lower-case hexadecimal digits; it is computed once.

        `watch` hears of each piece that was read, or of the whole file where its hash is known. `look` makes what is
        shown all pieces in order where the file is read, and may refuse one by an MqError.
        """
        if self._sha256 is None:
            self._sha256 = self.read(partial(_sha256, watch=watch, look=look))
        else:
            watch.advance(self.size, self.path.name)
        return self._sha256

    def known(self) -> KnownHash:
        """The file's hash and its state, for another process that reads the same file or a copy of it."""
        return KnownHash(self._state, self.sha256())

    def trust(self, known: KnownHash) -> bool:
        """Take over the hash of this same file that another machine has computed; False where it is not the same one.

        The number of its device may differ, for every machine has its own.
        """
        with self._lock:
            if replace(known.state, device=self._state.device) != self._state:
                return False
            self._sha256 = known.sha256
            return True

    def believe(self, known: KnownHash) -> None:
        """Take over a hash that somebody else has computed. A file that is not the same one is held against it before
        it is used for the first time; the number of its device may differ, for every machine has its own.
        """
        with self._lock:
            here = replace(known.state, device=self._state.device)
            self._state, self._sha256 = self._state if self._state == here else known.state, known.sha256
            self._is_believed = True

    def record(self, watch: Watch = UNWATCHED) -> dict[str, Any]:
        """What a provenance holds of the file, as it still is: {bytes, sha256}."""
        self.check()
        return {"bytes": self.size, "sha256": self.sha256(watch)}

    def content(self, limit: int) -> bytes:
        """All of the file's bytes, which from now on are the ones that `sha256` speaks of; refused above `limit`."""
        if self.size > limit:
            raise self._error(f"has {self.size} bytes, more than {limit}", file=self.path)
        data = self.read(lambda file: file.read(limit + 1))
        digest = hashlib.sha256(data).hexdigest()
        with self._lock:
            if self._sha256 not in (None, digest):
                raise self._changed()
            self._sha256 = digest
        return data

    def check(self) -> None:
        """Raise the error where the file is not as it was noted."""
        self.read(lambda _: None)

    def _accept(self, file: BufferedReader, state: FileState) -> None:
        with self._lock:
            if state == self._state:
                return
            if self._sha256 is None:
                if state.same_content(self._state):
                    return
            elif state.size == self._state.size and _sha256(file) == self._sha256:
                if FileState.of(file) == state:
                    self._state = state
                return
        raise self._changed()

    def _changed(self) -> MqError:
        if self._is_believed:
            return self._error(
                "has other bytes than the file of this name that was hashed for it",
                file=self.path,
                hint="copy the file here again, or see who has changed it",
            )
        return self._error(
            "changed after this command had begun to read it",
            file=self.path,
            hint="what was made from its old content is not used; run the command again when nothing writes there",
        )

    def _unreadable(self, fault: OSError) -> MqError:
        problem = f"cannot be read: {fault.strerror or fault}"
        return self._error(problem, file=self.path, hint=hint_of(fault, self._hint))


def _sha256(file: BufferedReader, watch: Watch = UNWATCHED, look: Callable[[], Look] | None = None) -> str:
    digest, name, shown = hashlib.sha256(), Path(file.name).name, look() if look else None
    file.seek(0)
    with ThreadPoolExecutor(1, thread_name_prefix="look") as beside:
        while block := file.read(_BLOCK):
            looked = beside.submit(shown, block) if shown else None
            digest.update(block)
            if looked:
                looked.result()
            watch.advance(len(block), name)
    return digest.hexdigest()
