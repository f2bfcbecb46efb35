"""Pieces of work as tasks of Ray: begun, retried, overtaken where they are slow, and noted as they end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ....formats.errors import ClusterError, MqError
from .job import Answer, Shard, Slice
from .ray_session import Needs, resources_of_nodes
from .slices import overtaken
from .waiting import Waiting

P = TypeVar("P", Slice, Shard)

RETRIES = 3
"""How often a piece is begun anew whose node or process was lost, or whose bytes are not those that it told."""
TICK = 1.0
"""Seconds after which slow and lost nodes are looked for, where nothing comes in."""


@dataclass
class Tasks(Generic[P]):
    """The tasks under way, by Ray's reference. Each calls `work` with what all of them are `told`, and its piece.

    `note(piece, answer)` takes what a task has done; it is false where that does not stand as the task told.
    """

    ray: Any
    needs: Needs
    work: Callable[..., Answer]
    told: Sequence[Any]
    note: Callable[[P, Answer], bool]
    on_note: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    _pieces: dict[Any, P] = field(default_factory=dict)
    _wrong: Counter[P] = field(default_factory=Counter)
    _seconds: list[float] = field(default_factory=list)
    _idle_since: float | None = None

    def __post_init__(self) -> None:
        self._waiting = Waiting(self.needs, self.clock(), self.on_note)
        self._work = self.ray.remote(**self.needs.options(), max_retries=RETRIES)(self.work)

    def run(self, pieces: Sequence[P]) -> None:
        """Run all pieces. Where one fails, what others have finished by then is noted before the error is raised."""
        try:
            for piece in pieces:
                self._begin(piece)
            while self._pieces:
                for task in self._ready(TICK):
                    self._end(task)
                self._look_around()
        except ClusterError:
            for task in self._ready(0):
                self._rescue(task)
            raise
        finally:
            self._cancel(list(self._pieces))

    def _begin(self, piece: P) -> None:
        task = self._work.options(name=piece.name).remote(*self.told, piece)
        self._pieces[task] = piece

    def _ready(self, timeout: float) -> list[Any]:
        """The tasks that have ended; at least one of them is waited for, for so many seconds at most."""
        tasks = list(self._pieces)
        ready, _ = self.ray.wait(tasks, num_returns=1 if timeout else max(1, len(tasks)), timeout=timeout)
        return list(ready)

    def _end(self, task: Any) -> None:
        piece = self._pieces.pop(task, None)
        if piece is None:  # it was overtaken just now
            return
        answer = self._answer(task, piece)
        self._waiting.heard(self.clock())
        if answer.failure is not None:
            raise _failed(piece, answer)
        if not self.note(piece, answer):
            self._repeat(piece, answer)
            return
        self._seconds.append(answer.seconds)
        self._cancel([other for other, same in self._pieces.items() if same == piece])

    def _answer(self, task: Any, piece: P) -> Answer:
        try:
            answer: Answer = self.ray.get(task)
        except self.ray.exceptions.RayError as e:
            said = str(e).strip().splitlines()
            raise ClusterError(
                f"{piece.name}: {said[-1] if said else type(e).__name__}",
                hint="see that all nodes have the same mq-quant and enough memory; the same command continues",
            ) from e
        return answer

    def _repeat(self, piece: P, answer: Answer) -> None:
        """Begin a piece anew whose bytes are not there; ClusterError where that does not help."""
        self._wrong[piece] += 1
        if self._wrong[piece] > RETRIES:
            raise ClusterError(
                f"{piece.name}: what node {answer.node} has written is not what is read here",
                hint="the file system under the output does not show all nodes the same bytes; use another one",
            )
        self._begin(piece)

    def _rescue(self, task: Any) -> None:
        """Note what a task has finished, though the build has failed."""
        piece = self._pieces.pop(task)
        try:
            self.note(piece, self._answer(task, piece))
        except MqError:  # the error that came first is the one to show
            return

    def _look_around(self) -> None:
        """Begin slow pieces once more where workers have nothing else to do; ClusterError where none will come back."""
        nodes, now = resources_of_nodes(self.ray), self.clock()
        self._waiting.look(nodes, now)
        workers = sum(map(self.needs.slots, nodes))
        if len(self._pieces) >= workers:
            self._idle_since = None
            return
        self._idle_since = self._idle_since or now
        for piece in overtaken(
            Counter(self._pieces.values()), workers, now - self._idle_since, self._seconds
        ):
            self._begin(piece)

    def _cancel(self, tasks: Sequence[Any]) -> None:
        for task in tasks:
            del self._pieces[task]
            self.ray.cancel(task, force=True)


def _failed(piece: Slice | Shard, answer: Answer) -> ClusterError:
    """What a worker reported, with the node on which it happened."""
    failure = answer.failure
    assert failure is not None
    error = ClusterError(f"{piece.name}, on node {answer.node}: {failure.message}", hint=failure.hint)
    error.exit_code = failure.exit_code
    return error
