"""The build: a job's units written at their offsets, journalled, resumable, the same bytes for any --jobs.

Payloads are written under a temporary name in the order of the work list; hashes follow in file order, so that nothing
large is left to do at the end. Depends on all of quantize below the cli.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ...formats.hfq import layout
from ...formats.machine import peak_rss
from ..calibrate.folder import discard_folder
from ..cli.progress_bar import Progress
from ..encode.encoders import CPU, Encoder
from ..spec.metadata import Outcome, complete
from ..write.hashing import Follower
from ..write.journal import Journal
from ..write.partial_file import CALIBRATION, JOURNAL, PARTIAL, PartialOutput, beside, check_output
from .build_spec import Job
from .notes import Notes, with_notes
from .work_units import Unit, units
from .worker_pool import Encoded, run_units, schedule


@dataclass(frozen=True)
class Options:
    """How a job is run; nothing here changes a byte of the file."""

    output: Path | None = None
    jobs: int = 1
    force: bool = False
    restart: bool = False
    quiet: bool = False
    coder: Encoder = CPU

    def path(self, default_name: str) -> Path:
        return self.output or Path(default_name)

    def check(self, default_name: str, total_bytes: int, source_bytes: int) -> None:
        """Refuse an output that exists or does not fit beside what the source stores; OutputError."""
        check_output(self.path(default_name), total_bytes, self.force, source_bytes)


def build(job: Job, options: Options) -> dict[str, Any]:
    """Build a job's file, or continue its unfinished build; returns what `build --json` prints.

    The final name appears only when every byte is written and synced. Raises OutputError before any work where the
    output exists or does not fit, ResumeError where an unfinished build there is of another job.
    """
    began = time.monotonic()
    final = options.path(job.output_name)
    partial, log, moments = (beside(final, suffix) for suffix in (PARTIAL, JOURNAL, CALIBRATION))
    options.check(job.output_name, job.plan.total_bytes, job.disk_bytes())

    def discard() -> None:
        for mine in (partial, log):
            mine.unlink(missing_ok=True)
        discard_folder(moments)

    if options.restart or not (partial.exists() and log.exists()):
        discard()
    journal = Journal(log, job.signature)
    try:
        output = PartialOutput(final, job.plan.total_bytes)
        try:
            if job.inline is not None:
                job.inline.open(moments)
            run = _write(job, options, journal, output)
            laid = layout(complete(job.metadata, run.outcome), [t.meta() for t in job.plan.tensors])
            output.write(0, memoryview(laid.header))
            output.commit()
        finally:
            output.close()
        discard()
    finally:
        if job.inline is not None:
            job.inline.close()
        journal.close()
        if not journal.done:
            discard()
    seconds = time.monotonic() - began
    return {
        "path": str(final),
        "total_bytes": job.plan.total_bytes,
        "tensor_count": len(job.plan.tensors),
        "quantization_hash": run.outcome.quantization_hash,
        "seconds": round(seconds, 3),
        "weights_per_second": round(run.weights / seconds),
        "peak_rss_bytes": peak_rss(),
        "coverage": job.importance.coverage if job.importance else None,
        "fallbacks": [note for layer in run.outcome.layers for note in layer["fallbacks"]],
        "fit": job.recipe.fit,
        "device": options.coder.device,
        "units": run.units,
        "resumed_units": run.resumed,
    }


@dataclass(frozen=True)
class _Run:
    """What one run of a build did: weights encoded by it, units in all, and units taken over from an earlier run."""

    outcome: Outcome
    weights: int
    units: int
    resumed: int


def _write(job: Job, options: Options, journal: Journal, output: PartialOutput) -> _Run:
    """Write every unit that is not yet there."""
    plan, in_file = job.plan, units(job.plan.tensors)
    order = schedule(job)
    kept = _intact(job, options, journal, output, order)
    todo = [unit for unit in order if unit.key not in kept]
    follower = Follower(job, output, in_file)
    for unit in order:
        if unit.key in kept:
            follower.advance(unit)
    total = sum(unit.weights for unit in in_file)
    weights = sum(unit.weights for unit in todo)
    with Progress(job.output_name, total, total - weights, options.quiet) as progress:

        def deliver(unit: Unit, done: Encoded) -> None:
            if done.payload.nbytes != unit.nbytes:
                raise AssertionError(
                    f"{unit.key}: {done.payload.nbytes} bytes encoded, {unit.nbytes} planned"
                )
            output.write(plan.data_offset + unit.start, done.payload.data)
            journal.record(unit.key, xxhash.xxh64_hexdigest(done.payload.data), **done.record)
            follower.advance(unit)
            progress.advance(unit.weights, unit.key)

        def gather(layer: int) -> None:
            # Moments of earlier layers are dropped now, so what was encoded with them must be on the disk.
            output.sync()
            assert job.inline is not None
            job.inline.begin_layer(layer)

        run_units(job, options.jobs, todo, deliver, options.coder, gather if job.inline else None)
    reports = _reports(job, journal, in_file)
    calibration = job.inline.finish() if job.inline else job.calibration
    outcome = Outcome(follower.hash.hexdigest, follower.checksums, reports, calibration)
    return _Run(outcome, weights, len(in_file), len(kept))


def _reports(job: Job, journal: Journal, in_file: Sequence[Unit]) -> list[dict[str, Any]]:
    """What is to be said of each layer, from the journal's lines of this run and of earlier ones."""
    notes: dict[int | None, dict[int, Notes]] = defaultdict(dict)
    for unit in in_file:
        if unit.expert is not None and (found := journal.done[unit.key].get("notes")):
            notes[unit.layer][unit.expert] = found
    experts = job.plan.config.num_local_experts
    reports = [(unit.layer, journal.done[unit.key]["report"]) for unit in in_file if unit.is_sidecar]
    return [with_notes(report, notes[layer], experts) for layer, report in reports]


def _intact(
    job: Job, options: Options, journal: Journal, output: PartialOutput, order: Sequence[Unit]
) -> frozenset[str]:
    """The units of an earlier run whose bytes still have the checksum that the journal holds for them."""

    def check(unit: Unit) -> bool:
        data = output.read(job.plan.data_offset + unit.start, unit.nbytes)
        return bool(xxhash.xxh64_hexdigest(data) == journal.done[unit.key]["xxh64"])

    known = [unit for unit in order if unit.key in journal.done]
    with ThreadPoolExecutor(options.jobs) as pool:
        return frozenset(unit.key for unit, good in zip(known, pool.map(check, known), strict=True) if good)
