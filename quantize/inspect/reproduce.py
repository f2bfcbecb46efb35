"""`mq-quant reproduce`: encode again what a file says it was made from, and compare byte for byte.

Nothing is written: each unit is compared with the file as it comes out of the encoder. Depends on engine and job.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...formats.errors import (
    CalibrationError,
    CheckError,
    CheckpointError,
    HfqError,
    HfqKind,
    ImatrixError,
    RecipeError,
)
from ...formats.hfq import HfqFile, TensorEntry, TensorMeta, open_hfq
from ...formats.hfq.provenance import Provenance, stated_quantization_hash
from ..cli.progress_bar import Progress
from ..pipeline.build_spec import Changes, Job, open_job
from ..pipeline.work_units import Unit
from ..pipeline.worker_pool import Encoded, run_units, schedule
from ..spec.places import retarget
from ..spec.provenance import program
from ..spec.recipe import Recipe, parse_recipe
from .show import provenance


def recorded_recipe(record: Provenance, file: Path, source: str | None) -> Recipe:
    """The recipe in a file's provenance, its weights taken from `source` where the file names no place for them.

    Raises RecipeError where neither does, HfqError where the record is not one of ours.
    """
    document = dict(record.recipe.document) if record.recipe else {}
    if not isinstance(document.get("model"), dict):
        raise HfqError("its provenance holds no recipe", kind=HfqKind.PROVENANCE, file=file)
    model = document["model"]
    origin = model.get("source")
    if isinstance(origin, dict) and origin.get("repository") is None:
        if source is None:
            raise RecipeError(
                f"was made from a folder named {model.get('name')!r}, and says no more about where that is",
                file=file,
                hint="give the folder as --source",
            )
        document = {**document, "model": {**model, "source": {"folder": source}}}
    recipe = parse_recipe(document, str(file))
    return retarget(recipe, source) if source is not None else recipe


def check_inputs(record: Provenance, job: Job, file: Path) -> None:
    """Refuse inputs that are not those that the file was made from, naming the first that differs."""
    if record.source is None or not record.source.files:
        raise HfqError(
            "its provenance does not say which files of a source it was made from",
            kind=HfqKind.PROVENANCE,
            file=file,
            hint="the record was edited, so nothing can be held against it",
        )
    files = {key: value for key, value in job.signature.items() if key.startswith("source.files.")}
    for name, stated in record.source.files.items():
        if files.get(f"source.files.{name}.sha256") != stated:
            raise CheckpointError(
                f"{name} is not the file that this was made from",
                file=file,
                hint="check --source and its revision",
            )
    if record.imatrix and record.imatrix.sha256 != job.signature.get("imatrix.sha256"):
        raise ImatrixError(
            "the imatrix is not the one that this was made with", file=file, hint="check --imatrix"
        )
    if record.calibration and record.calibration.sha256 != job.signature.get("calibration.sha256"):
        raise CalibrationError(
            "the calibration is not the one that this was made with", file=file, hint="check --calibration"
        )


def reproduce(
    path: Path,
    source: str | None,
    imatrix: Path | None,
    jobs: int,
    quiet: bool,
    calibration: Path | None = None,
) -> dict[str, Any]:
    """Rebuild a file's payloads from its provenance; returns what `reproduce --json` prints.

    Raises CheckError where the inputs give another file layout, and the errors of inputs that differ or are missing.
    """
    record = provenance(path)
    recipe = recorded_recipe(record, path, source)
    calibrated = record.calibration is not None
    if calibrated and calibration is None:
        raise CalibrationError(
            "was made with a calibration folder", file=path, hint="give that folder as --calibration"
        )
    if calibrated and imatrix is not None and record.imatrix is None:
        raise ImatrixError(
            "was made with a calibration folder alone, without an imatrix",
            file=path,
            hint="leave --imatrix out",
        )
    changes = Changes(
        imatrix=imatrix,
        no_imatrix=record.imatrix is None and not calibrated,
        calibration=calibration if calibrated else None,
    )
    with open_job(recipe, changes) as job, open_hfq(path) as file:
        check_inputs(record, job, path)
        if [t.meta() for t in job.plan.tensors] != [_meta(e) for e in file.entries]:
            raise CheckError("its tensors are not those that its recipe gives", file=path)
        different = _differences(job, file, jobs, quiet)
        return {
            "path": str(path),
            "identical": not different,
            "tensor_count": len(file.entries),
            "different_tensors": different,
            "quantization_hash": stated_quantization_hash(file.metadata),
            "made_by": {"version": record.program.version, "commit": record.program.commit},
            "this_program": {key: program()[key] for key in ("version", "commit")},
        }


def _meta(entry: TensorEntry) -> TensorMeta:
    return TensorMeta(entry.name, entry.quant_type, entry.shape, entry.group_size, entry.nbytes)


def _differences(job: Job, file: HfqFile, jobs: int, quiet: bool) -> list[str]:
    different: list[str] = []
    order = schedule(job)
    with Progress(f"reproduce {job.output_name}", sum(u.weights for u in order), 0, quiet) as progress:

        def compare(unit: Unit, done: Encoded) -> None:
            at = unit.start
            for tensor in unit.tensors:
                entry = file.entry(tensor.name)
                low = max(at, tensor.start) - tensor.start
                high = min(unit.start + unit.nbytes, tensor.start + tensor.nbytes) - tensor.start
                mine = done.payload[tensor.start + low - at : tensor.start + high - at]
                if (
                    not np.array_equal(mine, file.read_range(entry, low, high))
                    and tensor.name not in different
                ):
                    different.append(tensor.name)
            progress.advance(unit.weights, unit.key)

        run_units(job, jobs, order, compare)
    return different
