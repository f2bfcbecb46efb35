"""A worker by itself, in this process: it takes no job of another program, of other inputs, or without a source."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hub_server
import pytest
from mq_quant.quantize.encode.encoders import Encoder
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.build_spec import BuildSpec, open_builds
from mq_quant.quantize.pipeline.cluster import delivery, worker
from mq_quant.quantize.pipeline.cluster.delivery import Target, marker_of
from mq_quant.quantize.pipeline.cluster.job import Answer, Job, Shard, Slice
from mq_quant.quantize.pipeline.cluster.slices import cut
from mq_quant.quantize.pipeline.cluster.worker import encode_slice, hash_shard, identity
from mq_quant.quantize.pipeline.statistics import ImatrixFile, NoStatistics
from mq_quant.quantize.pipeline.work_units import work_order
from mq_quant.quantize.spec.places import choose_recipe

from .conftest import CHANGES

SECRET = bytes(range(32))


@dataclass(frozen=True)
class Given:
    """A driver's job on a file that the worker sees, and its slices."""

    job: Job
    slices: tuple[Slice, ...]

    def answer(self, **changed: Any) -> Answer:
        return encode_slice(identity(), pickle.dumps(replace(self.job, **changed)), self.slices[1])


@pytest.fixture
def given(source: Path, tmp_path: Path) -> Iterator[Given]:
    recipe = choose_recipe("mq2", None, str(source))
    with open_builds([recipe], ImatrixFile(source / "imatrix.gguf"), CHANGES) as (spec,):
        yield job_of(spec, tmp_path)
    worker._HERE.close()


def job_of(spec: BuildSpec, folder: Path) -> Given:
    """The job of a spec, on an unfinished file in a folder."""
    output = folder / "out.partial"
    marker_of(output).write_bytes(SECRET)
    output.write_bytes(bytes(spec.plan.total_bytes))
    order, target = work_order(spec), Target(str(output), SECRET, ("127.0.0.1", 1))
    return Given(Job.of(spec, target, 1, "cpu", 2), cut(order, order, spec.plan.data_offset, 1))


def failure_of(answer: Answer) -> str:
    assert answer.failure is not None and not answer.units
    return answer.failure.message


def test_a_slice_stands_where_it_is_planned(given: Given, whole: bytes) -> None:
    answer = given.answer()
    assert answer.failure is None
    assert [unit.key for unit in answer.units] == [key for key, _ in given.slices[1].units]
    written = Path(given.job.target.path).read_bytes()
    starts = sorted(place for piece in given.slices for _, place in piece.units)
    for _, place in given.slices[1].units:
        end = next((start for start in starts if start > place), len(whole))
        assert written[place:end] == whole[place:end]


def test_a_process_opens_the_job_anew_where_it_is_given_another_gpu(
    given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, open_encoder = list[str](), worker.open_encoder

    def opens(device: str) -> AbstractContextManager[Encoder]:
        opened.append(device)
        return open_encoder("cpu")

    monkeypatch.setattr(worker, "open_encoder", opens)
    job = pickle.dumps(replace(given.job, device="cuda"))
    answers = [encode_slice(identity(), job, given.slices[1], gpu) for gpu in (1, 1, 0)]
    assert opened == ["cuda:1", "cuda:0"]
    assert answers[0].units == answers[1].units == answers[2].units == given.answer().units


def test_another_program_is_refused_before_the_job_is_looked_at(given: Given) -> None:
    other = {**identity(), "mq-quant": "0.0.1"}
    answer = encode_slice(other, b"not a pickle", given.slices[0])
    assert "runs another mq-quant than the driver: mq-quant is '0.0.1' there and" in failure_of(answer)
    answer = encode_slice({**identity(), "sources": "0" * 16}, b"not a pickle", given.slices[0])
    assert "sources is '0000000000000000' there and" in failure_of(answer)


def test_a_worker_without_the_source_says_where_it_looked(given: Given, tmp_path: Path) -> None:
    place = given.job.recipe.model.place.model_copy(update={"folder": str(tmp_path / "nowhere")})
    model = given.job.recipe.model.model_copy(update={"place": place})
    recipe = given.job.recipe.model_copy(update={"model": model})
    assert f"no such folder: {tmp_path / 'nowhere'}" in failure_of(given.answer(recipe=recipe))


def test_a_worker_without_the_imatrix_says_so(given: Given, tmp_path: Path) -> None:
    assert "nothing.gguf" in failure_of(given.answer(statistics=ImatrixFile(tmp_path / "nothing.gguf")))


def test_a_shard_that_a_node_does_not_see_is_named(source: Path, tmp_path: Path) -> None:
    (shard, *_) = source.glob("*.safetensors")
    hashed = hash_shard(identity(), Shard(shard.name, str(shard))).hashed
    assert hashed is not None and hashed.sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()
    answer = hash_shard(identity(), Shard(shard.name, str(tmp_path / shard.name)))
    assert "cannot be read: No such file" in failure_of(answer)
    assert "runs another mq-quant" in failure_of(hash_shard({}, Shard(shard.name, str(shard))))


def test_other_inputs_are_named(given: Given) -> None:
    signature = {**given.job.signature, "recipe.tier": "mq3"}
    said = failure_of(given.answer(signature=signature))
    assert "has other inputs than the driver:\n    recipe.tier is 'mq3' there and 'mq2' here" in said


def copied(given: Given, source: Path, folder: Path) -> Any:
    """The job with a copy of the source, which has other inodes, in a folder of the same name."""
    copy = shutil.copytree(source, folder / source.name)
    place = given.job.recipe.model.place.model_copy(update={"folder": str(copy)})
    model = given.job.recipe.model.model_copy(update={"place": place})
    return copy, given.job.recipe.model_copy(update={"model": model})


def test_a_copy_of_the_source_will_do(given: Given, source: Path, tmp_path: Path) -> None:
    _, recipe = copied(given, source, tmp_path / "elsewhere")
    assert given.answer(recipe=recipe).units == given.answer().units


def test_a_copy_with_another_byte_is_refused_before_it_is_used(
    given: Given, source: Path, tmp_path: Path
) -> None:
    copy, recipe = copied(given, source, tmp_path / "elsewhere")
    for shard in copy.glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        times = (source / shard.name).stat()
        shard.write_bytes(data)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    said = failure_of(given.answer(recipe=recipe))
    assert "has other bytes than the file of this name that was hashed for it" in said


def test_a_disk_that_is_full_is_a_clear_answer(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(delivery, "write_all", full)
    answer = given.answer()
    assert failure_of(answer) == f"{given.job.target.path}: the disk is full"
    assert answer.failure is not None and "it continues where it stopped" in str(answer.failure.hint)


def test_a_worker_streams_its_own_shards_and_leaves_none(
    small_hub: hub_server.HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(worker.tempfile, "tempdir", str(scratch))
    recipe = choose_recipe("mq2", None, hub_server.REPO)
    made = build_file(recipe, NoStatistics(), RunOptions(tmp_path / "one")).path.read_bytes()
    with open_builds([recipe], NoStatistics(), scratch=tmp_path) as (spec,):
        given = job_of(spec, tmp_path)
    job, start = pickle.dumps(given.job), spec.plan.data_offset
    for piece in given.slices:
        assert encode_slice(identity(), job, piece).failure is None
    assert Path(given.job.target.path).read_bytes()[start:] == made[start:]
    assert not list(scratch.rglob("*.safetensors"))
    worker._HERE.close()
