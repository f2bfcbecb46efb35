"""What a build knows of the inputs of its matrices: nothing, an imatrix, a calibration folder, or its own calibration.

`Statistics` says what was asked for; `find` opens it and holds it against the model, on metadata alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...awq.from_imatrix import ImatrixModel, load_importance
from ...awq.from_moments import blank_record, load_calibration
from ...awq.importance import ModelImportance
from ...formats.checkpoint.source import Source, lies_here
from ...formats.errors import CalibrationError, ImatrixError
from ...formats.minimax import ModelConfig
from ...formats.statistics.imatrix import read_imatrix
from ...texts import CALIBRATION_SHA256
from ..calibrate.tokens import TokenRequest, load_tokens
from ..spec.places import local_folder
from ..spec.recipe import Effort, Recipe

if TYPE_CHECKING:
    from ..calibrate.on_the_fly import GatheredImportance
    from ..tune.layer import TuneSettings


@dataclass(frozen=True)
class NoStatistics:
    """A plain build: no importance and no AWQ scale; the file says so."""


@dataclass(frozen=True)
class ImatrixFile:
    """An imatrix of llama.cpp's family, GGUF or .dat, instead of the recipe's own."""

    path: Path


@dataclass(frozen=True)
class MomentFolder:
    """A folder of `calibrate`; an imatrix, where one is given, stands behind moments of too few tokens."""

    folder: Path
    imatrix: Path | None = None


@dataclass(frozen=True)
class OnTheFly:
    """Moments that the build gathers itself, each layer's just before the layer is encoded, on a device of torch's.

    An imatrix stands behind moments of too few tokens: the one given, else the recipe's own where it has one. With
    `tuning` each layer is tuned against the source's after it is rounded. A `state` is a folder of streams between
    layers, from which a part begins; it decides no byte. `sensitivity` is whether the source first runs forward and
    back, to find what errors behind each layer cost: None, where it lies here.
    """

    tokens: TokenRequest = field(default_factory=TokenRequest)
    device: str = "cpu"
    imatrix: Path | None = None
    tuning: TuneSettings | None = None
    state: Path | None = None
    sensitivity: bool | None = None

    def sensitive(self, source: Source) -> bool:
        """Whether a build from this source finds what errors behind each layer cost; CalibrationError where it is asked
        to, and the source does not lie here.
        """
        here = lies_here(source)
        if self.sensitivity and not here:
            raise CalibrationError(
                "what errors behind each layer cost takes a source that lies here: it is read twice more",
                hint="download the checkpoint, and give its folder as --source",
            )
        return here if self.sensitivity is None else self.sensitivity


Statistics = NoStatistics | ImatrixFile | MomentFolder | OnTheFly
"""Where none of these is given, the recipe's own imatrix is used."""


def effort_of(statistics: Statistics | None) -> Effort | None:
    """The effort of a build with these statistics; None where it has none."""
    match statistics:
        case NoStatistics():
            return None
        case OnTheFly(tuning=tuning) if tuning is not None:
            return "tuned"
        case MomentFolder() | OnTheFly():
            return "calibrated"
        case _:
            return "imatrix"


def own_imatrix(statistics: Statistics | None) -> bool:
    """Whether the imatrix in use is the recipe's own, if it has one."""
    return statistics is None or (isinstance(statistics, OnTheFly) and statistics.imatrix is None)


def input_paths(statistics: Statistics | None) -> tuple[Path | None, ...]:
    """The files and folders that were given, None for those that were not."""
    match statistics:
        case ImatrixFile(path):
            return (path,)
        case MomentFolder(folder, imatrix):
            return folder, imatrix
        case OnTheFly(tokens, _, imatrix, _, state):
            return tokens.text, tokens.tokens, imatrix, state
        case _:
            return ()


@dataclass(frozen=True)
class Importances:
    """The importances that a build uses, and what is said of them.

    `signature` names the inputs by their hashes; `stated` is what the metadata say of them before the work. `record` is
    what the finished file says of its calibration; where the build gathers it (`gathered`) that is known at the end.
    """

    model: ModelImportance | None
    signature: Mapping[str, Any]
    stated: Mapping[str, Any]
    record: Mapping[str, Any] | None = None
    gathered: GatheredImportance | None = None


def begin_gathering(statistics: Statistics | None, source: Source) -> GatheredImportance | None:
    """The calibration that the build will gather, its tokens and device checked; torch is loaded for it alone."""
    if not isinstance(statistics, OnTheFly):
        return None
    from ..calibrate.on_the_fly import GatheredImportance
    from ..calibrate.state import CalibrationState

    request = statistics.tokens
    text = CALIBRATION_SHA256 if request.bundled else None
    tokens = load_tokens(source, request)
    tuned = statistics.tuning is not None
    state = CalibrationState.open(statistics.state) if statistics.state else None
    return GatheredImportance(
        source,
        tokens,
        statistics.device,
        text,
        keep_outputs=tuned,
        state=state,
        sensitive=statistics.sensitive(source),
    )


def imatrix_path(recipe: Recipe, statistics: Statistics | None) -> Path | None:
    """The imatrix in use: the one given, or the recipe's own where no statistics are given. It may be fetched.

    Raises ImatrixError where there is none, HubError where it cannot be fetched.
    """
    match statistics:
        case ImatrixFile(path):
            return path
        case MomentFolder(_, path):
            return path
        case OnTheFly(imatrix=path) if path is not None or recipe.model.imatrix is None:
            return path
        case NoStatistics():
            return None
    ref = recipe.model.imatrix
    if ref is None:
        raise ImatrixError(
            "no imatrix was given, and there is none of its own for this source",
            hint="give --imatrix FILE (llama.cpp's GGUF or .dat), or --effort calibrated, which needs none",
        )
    if ref.repository is not None:
        from ...formats.hub.files import fetch_file

        return fetch_file(ref.repository, ref.file, ref.revision)
    folder = local_folder(recipe.model.place.address)
    if folder is None:
        raise ImatrixError(f"the recipe names {ref.file} without its repository", hint="give --imatrix FILE")
    return folder / ref.file


def open_imatrix(path: Path | None, config: ModelConfig) -> ImatrixModel | None:
    """The importances in an imatrix, held against the model; ImatrixError where they cannot be used."""
    return load_importance(read_imatrix(path), config) if path is not None else None


def check_pin(recipe: Recipe, statistics: Statistics | None, imatrix: ImatrixModel | None) -> None:
    """ImatrixError where the recipe's own imatrix is in use, and its bytes are not those that the recipe pins."""
    ref = recipe.model.imatrix
    if imatrix is None or ref is None or ref.sha256 is None or not own_imatrix(statistics):
        return
    found = imatrix.record()["sha256"]
    if found != ref.sha256:
        raise ImatrixError(
            f"the recipe pins the imatrix {ref.file} by the hash {ref.sha256}, and this one has {found}",
            hint="it was replaced since; give the old one, or the new one on purpose, as --imatrix",
        )


def _tuning_record(statistics: Statistics | None, gathered: GatheredImportance) -> dict[str, Any]:
    """What decides the bytes of tuning besides the calibration, and what a file says of it; empty without tuning."""
    if not isinstance(statistics, OnTheFly) or statistics.tuning is None:
        return {}
    from torch import get_num_threads

    threads = get_num_threads() if gathered.device.type == "cpu" else None
    return {"tuning": {"settings": statistics.tuning.record(), "threads": threads}}


def find(
    statistics: Statistics | None,
    imatrix: ImatrixModel | None,
    config: ModelConfig,
    made_from: Mapping[str, Any],
    gathered: GatheredImportance | None,
) -> Importances:
    """The importances in use; a calibration folder is opened and held against the model and its source.

    `made_from` is the source's {origin, files}. Raises CalibrationError for a folder of another model.
    """
    record = imatrix.record() if imatrix else None
    signature = {"imatrix": {"sha256": record["sha256"]} if record else None}
    if isinstance(statistics, MomentFolder):
        model = load_calibration(statistics.folder, config, made_from, imatrix)
        said = model.record()
        return Importances(
            model,
            {**signature, "calibration": {"sha256": said["sha256"]}},
            {"imatrix": record, "calibration": blank_record(said)},
            said,
        )
    if gathered is not None:
        gathered.bind(made_from, imatrix)
        tuning = _tuning_record(statistics, gathered)
        return Importances(
            gathered,
            {**signature, "calibration": gathered.signature(), **tuning},
            {"imatrix": record, "calibration": blank_record(gathered.record()), **tuning},
            gathered=gathered,
        )
    return Importances(imatrix, signature, {"imatrix": record})
