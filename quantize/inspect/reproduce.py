"""`mq-quant reproduce`: encode again what a file says it was made from, and compare byte for byte.

Nothing is written: each unit is compared with the file as it comes out of the encoder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...formats.blocks import AffineFormat, LloydFormat
from ...formats.errors import (
    CalibrationError,
    CheckError,
    CheckpointError,
    HfqError,
    HfqKind,
    ImatrixError,
    RecipeError,
    TokenError,
)
from ...formats.hfq import HfqFile, TensorEntry, TensorMeta, open_hfq
from ...formats.hfq.provenance import Provenance, stated_quantization_hash
from ...formats.text import shown
from ...formats.watch import UNWATCHED, Watch
from ...texts import CALIBRATION_SHA256
from ..calibrate.tokens import TokenRequest
from ..pipeline.build_spec import BuildSpec, open_builds
from ..pipeline.encoding import Encoded
from ..pipeline.statistics import ImatrixFile, MomentFolder, NoStatistics, OnTheFly, Statistics
from ..pipeline.turns import LayersInTurn, Turns
from ..pipeline.work_units import WorkUnit, work_order
from ..pipeline.worker_pool import UnitHook, Workers, run_units
from ..spec.hooks import nothing
from ..spec.places import retarget
from ..spec.provenance import program
from ..spec.recipe import Model, Recipe, load_model, models, parse_recipe
from ..tune.student import head_bytes
from .show import provenance


@dataclass(frozen=True)
class Inputs:
    """What a person names for a reproduction: a source (as `--source` takes it), an imatrix, a calibration folder, or
    the tokens that the build was calibrated on.

    A file may come from anybody. Its record may name places, and nothing is read or fetched from a place that is
    neither named here nor one of a bundled model's.
    """

    source: str | None = None
    imatrix: Path | None = None
    calibration: Path | None = None
    tokens: TokenRequest | None = None
    device: str = "cpu"


def recorded_recipe(record: Provenance, file: Path, inputs: Inputs) -> Recipe:
    """The recipe in a file's provenance, its weights taken from the source that the person names.

    Raises RecipeError or ImatrixError where the record names a place that has to be confirmed first, HfqError where
    the record is not one of ours.
    """
    document = dict(record.recipe.document) if record.recipe else {}
    if not isinstance(document.get("model"), dict):
        raise HfqError("its provenance holds no recipe", kind=HfqKind.PROVENANCE, file=file)
    model, source = document["model"], inputs.source
    origin = model.get("source")
    if isinstance(origin, dict) and origin.get("repository") is None:
        if source is None:
            raise RecipeError(
                f"was made from a folder named {shown(model.get('name'))}, and says no more about where that is",
                file=file,
                hint="give the folder as --source",
            )
        document = {**document, "model": {**model, "source": {"folder": source}}}
    recipe = parse_recipe(document, str(file))
    if source is not None:
        recipe = retarget(recipe, source)
    _check_places(recipe.model, record, file, inputs)
    return recipe


def _check_places(model: Model, record: Provenance, file: Path, inputs: Inputs) -> None:
    """Refuse places that neither the person nor a bundled model names."""
    known = {place for name in models() for place in _repositories(load_model(name))}
    if inputs.source is None and model.place.repository not in known:
        raise RecipeError(
            f"was made from {shown(model.place.repository)}, a repository that this program does not know",
            file=file,
            hint="nothing is fetched from it unless you name it: give --source OWNER/NAME, or a folder with its files",
        )
    own = model.imatrix if record.imatrix and inputs.imatrix is None and record.calibration is None else None
    if own is not None and own.repository not in {None, model.place.repository, *known}:
        raise ImatrixError(
            f"was made with an imatrix of {shown(own.repository)}, a repository that this program does not know",
            file=file,
            hint="nothing is fetched from it: fetch the imatrix yourself if you trust it, and give it as --imatrix",
        )


def _repositories(model: Model) -> set[str | None]:
    return {model.place.repository, model.imatrix.repository if model.imatrix else None} - {None}


def check_inputs(record: Provenance, spec: BuildSpec, file: Path) -> None:
    """Refuse inputs that are not those that the file was made from, naming the first that differs."""
    if record.source is None or not record.source.files:
        raise HfqError(
            "its provenance does not say which files of a source it was made from",
            kind=HfqKind.PROVENANCE,
            file=file,
            hint="the record was edited, so nothing can be held against it",
        )
    for name, stated in record.source.files.items():
        if spec.signature.get(f"source.files.{name}.sha256") != stated:
            raise CheckpointError(
                f"{name} is not the file that this was made from",
                file=file,
                hint="check --source and its revision",
            )
    if record.imatrix and record.imatrix.sha256 != spec.signature.get("imatrix.sha256"):
        raise ImatrixError(
            "the imatrix is not the one that this was made with", file=file, hint="check --imatrix"
        )
    if spec.gathered is not None:
        _check_tokens(record, spec, file)
    elif record.calibration and record.calibration.sha256 != spec.signature.get("calibration.sha256"):
        raise CalibrationError(
            "the calibration is not the one that this was made with", file=file, hint="check --calibration"
        )


def _check_tokens(record: Provenance, spec: BuildSpec, file: Path) -> None:
    """Refuse tokens that are not those that the file was calibrated on."""
    stated = tokens_record(record)
    for key in ("sequences", "length", "sha256"):
        here = spec.signature.get(f"calibration.tokens.{key}")
        if stated.get(key) != here:
            raise TokenError(
                f"the tokens are not those that this was calibrated on: {key} is {shown(stated.get(key))} there and "
                f"{shown(here)} here",
                file=file,
                hint="give the same --text or --tokens, with the same --sequences and --length",
            )


def tokens_record(record: Provenance) -> Mapping[str, Any]:
    """What a record says of the tokens of its calibration."""
    stated = record.calibration.document.get("tokens") if record.calibration else None
    return stated if isinstance(stated, Mapping) else {}


@dataclass(frozen=True)
class Reproduction:
    """A file held against what its provenance gives. `made_by` and `this_program` are {version, commit}.

    Of `tuned_tensors` only the codes were compared, or nothing where they have none: tuning moved the rest.
    """

    path: Path
    tensor_count: int
    tuned_tensors: int
    different_tensors: tuple[str, ...]
    quantization_hash: str | None
    made_by: dict[str, Any]
    this_program: dict[str, Any]

    @property
    def identical(self) -> bool:
        return not self.different_tensors

    def as_json(self) -> dict[str, Any]:
        """What `reproduce --json` prints."""
        return {
            "path": str(self.path),
            "identical": self.identical,
            **{key: value for key, value in asdict(self).items() if key != "path"},
            "different_tensors": list(self.different_tensors),
        }


def reproduce(
    path: Path,
    inputs: Inputs = Inputs(),
    jobs: int = 1,
    watch: Watch = UNWATCHED,
    on_done: UnitHook = nothing,
) -> Reproduction:
    """Encode again what a file says it was made from, and compare every payload.

    `watch` hears of the work, `on_done(unit)` is called when a unit is compared. Raises CheckError where the inputs
    give another file layout, and the errors of inputs that differ or are missing.
    """
    record = provenance(path)
    recipe = recorded_recipe(record, path, inputs)
    statistics = _statistics(record, path, inputs)
    with open_builds([recipe], statistics, watch=watch) as (spec,), open_hfq(path) as file:
        check_inputs(record, spec, path)
        if [t.meta() for t in spec.plan.tensors] != [_meta(e) for e in file.entries]:
            raise CheckError("its tensors are not those that its recipe gives", file=path)
        order = work_order(spec)
        watch.begin("comparing", sum(unit.weights for unit in order), "weights")
        different: dict[str, None] = {}
        tuned = record.tuned_layers

        def compare(unit: WorkUnit, done: Encoded) -> None:
            different.update(dict.fromkeys(_different(unit, done, file, unit.layer in tuned)))
            watch.advance(unit.weights, unit.key)
            on_done(unit)

        with gathering(spec) as turns:
            run_units(spec, order, compare, Workers(jobs, turns=turns))
        return Reproduction(
            path=path,
            tensor_count=len(file.entries),
            tuned_tensors=sum(tensor.layer in tuned for tensor in spec.plan.tensors),
            different_tensors=tuple(different),
            quantization_hash=stated_quantization_hash(file.metadata),
            made_by={"version": record.program.version, "commit": record.program.commit},
            this_program={key: program()[key] for key in ("version", "commit")},
        )


@contextmanager
def gathering(spec: BuildSpec) -> Iterator[Turns | None]:
    """What has each layer's moments ready, where they are gathered again; the scratch folder is removed at the end."""
    gathered = spec.gathered
    if gathered is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="mq-quant-") as scratch:
        try:
            gathered.open(Path(scratch) / "calibration")
            yield LayersInTurn(gathered)
        finally:
            gathered.close()


def _statistics(record: Provenance, path: Path, inputs: Inputs) -> Statistics | None:
    """The statistics that the file was made with; errors where the ones given are missing or do not belong to it."""
    gathered = record.calibration is not None and record.calibration.document.get("rows") is True
    _check_use(record, path, inputs, gathered)
    if record.calibration is not None and gathered:
        sensitivity = "sensitivity" in record.calibration.document
        tokens = _tokens(record, path, inputs)
        return OnTheFly(tokens, inputs.device, inputs.imatrix, sensitivity=sensitivity)
    if record.calibration is not None:
        if inputs.calibration is None:
            raise CalibrationError(
                "was made with a calibration folder", file=path, hint="give that folder as --calibration"
            )
        return MomentFolder(inputs.calibration, inputs.imatrix)
    if record.imatrix is None:
        return NoStatistics()
    return ImatrixFile(inputs.imatrix) if inputs.imatrix is not None else None


def _check_use(record: Provenance, path: Path, inputs: Inputs, gathered: bool) -> None:
    """Refuse inputs that the file was made without: they would not be looked at."""
    if inputs.imatrix is not None and record.imatrix is None:
        raise ImatrixError("was made without an imatrix", file=path, hint="leave --imatrix out")
    if inputs.calibration is not None and (record.calibration is None or gathered):
        how = (
            "calibrated itself on tokens, without a folder" if gathered else "was made without a calibration"
        )
        raise CalibrationError(how, file=path, hint="leave --calibration out")
    if inputs.tokens is not None and not gathered:
        raise TokenError(
            "was not calibrated on tokens by its build", file=path, hint="leave --text and --tokens out"
        )


def _tokens(record: Provenance, path: Path, inputs: Inputs) -> TokenRequest:
    """The tokens that the file was calibrated on: those given, or the package's own text where the record names it."""
    if inputs.tokens is not None:
        return inputs.tokens
    assert record.calibration is not None
    stated = tokens_record(record)
    sequences, length = stated.get("sequences"), stated.get("length")
    ours = record.calibration.document.get("text") == CALIBRATION_SHA256
    if not (ours and isinstance(sequences, int) and isinstance(length, int)):
        raise TokenError(
            "was calibrated on tokens that mq-quant does not have",
            file=path,
            hint="give the same text or tokens as --text or --tokens, with the same --sequences and --length",
        )
    return TokenRequest(sequences=sequences, length=length)


def _meta(entry: TensorEntry) -> TensorMeta:
    return TensorMeta(entry.name, entry.quant_type, entry.shape, entry.group_size, entry.nbytes)


def _different(unit: WorkUnit, done: Encoded, file: HfqFile, tuned: bool) -> Iterator[str]:
    """The tensors of a unit whose bytes in the file are not those that were encoded; of tuned ones, whose codes."""
    for tensor in unit.tensors:
        fmt = tensor.format
        if tuned and not isinstance(fmt, LloydFormat | AffineFormat):
            continue
        low = max(unit.start, tensor.start) - tensor.start
        high = min(unit.start + unit.nbytes, tensor.start + tensor.nbytes) - tensor.start
        at = tensor.start - unit.start
        mine = done.payload[at + low : at + high]
        theirs = file.read_range(file.entry(tensor.name), low, high)
        if tuned and isinstance(fmt, LloydFormat | AffineFormat):
            mine, theirs = (fmt.groups(payload)[:, head_bytes(fmt) :] for payload in (mine, theirs))
        if not np.array_equal(mine, theirs):
            yield tensor.name
