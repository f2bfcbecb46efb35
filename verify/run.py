"""All stages of `mq-quant verify` in order, and one result object.

A stage that cannot run is a failed stage. A stage that was not asked for is listed as skipped, with the reason: nothing
is said of what was not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..formats.checkpoint.names import TOKENIZER
from ..formats.checkpoint.source import Source
from ..formats.errors import CheckError, MqError
from ..formats.hfq import HfqFile
from ..formats.machine import peak_rss
from ..formats.minimax import ModelConfig, normalize_config, parse_config
from ..formats.statistics.imatrix import Imatrix
from ..formats.text import shown
from ..formats.watch import UNWATCHED, Watch
from ..kernels.runtime.host import Backend
from .against_source import SourceComparison, Stage
from .bars import Bars
from .facts import FileFacts
from .model.metrics import FEWEST
from .stages.decode_parity import check_decode, sampled
from .stages.forward_parity import POSITIONS, check_forward
from .stages.generation import check_generation
from .stages.splitting import split_notes
from .stages.stage import Figures, StageResult
from .stages.structure import check_structure

F = TypeVar("F", bound=Figures)
T = TypeVar("T")
NO_TOKENS = "no tokens to run; give --tokens, --prompt or --token-file"


@dataclass(frozen=True)
class VerifyInputs:
    """What to verify a file against.

    `tokens` i64 [n_seq, len] go through the file, the first ones by the kernels, and through the source; `prompt` i64
    [n] is continued by `generate` tokens; None where there are none. Fewer than `fewest` positions are not judged by.
    `notes` say where the tokens come from, and are handed on with the predictions; `unjudged` says why these
    are not to be judged.
    """

    source: Source | None = None
    imatrix: Imatrix | None = None
    tokens: NDArray[np.int64] | None = None
    prompt: NDArray[np.int64] | None = None
    bars: Bars = field(default_factory=Bars)
    sample: bool = False
    generate: int = 0
    dump: Path | None = None
    fewest: int = FEWEST
    notes: tuple[str, ...] = ()
    unjudged: str | None = None

    def close(self) -> None:
        """Close the source."""
        if self.source is not None:
            self.source.close()


@dataclass(frozen=True)
class Verification:
    """The result of all stages that ran, in order, and why others did not; `seconds` is what each stage took.

    `facts` are what the file says of itself, `bars` what it was held to.
    """

    path: Path
    stages: tuple[StageResult, ...]
    skipped: Mapping[str, str]
    seconds: Mapping[str, float]
    peak_rss_bytes: int
    facts: FileFacts | None = None
    bars: Bars = field(default_factory=Bars)

    @property
    def ok(self) -> bool:
        return bool(self.stages) and all(stage.ok for stage in self.stages)

    def figures(self, kind: type[F]) -> F | None:
        """What one stage measured, by the type of its figures; None where that stage did not run to its end."""
        return next((s.figures for s in self.stages if isinstance(s.figures, kind)), None)

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "ok": self.ok,
            "stages": [{**s.as_json(), "seconds": round(self.seconds[s.name], 3)} for s in self.stages],
            "skipped": dict(self.skipped),
            "peak_rss_bytes": self.peak_rss_bytes,
            "file": self.facts.as_json() if self.facts else None,
            "bars": self.bars.model_dump(exclude_none=True),
        }

    def raise_if_failed(self) -> None:
        """CheckError that names the first problem of each failed stage."""
        failed = [stage for stage in self.stages if not stage.ok]
        if not self.stages:
            raise CheckError("no stage ran, so nothing is known of it", file=self.path)
        if failed:
            lines = [f"{stage.name}: {_first(stage)}" for stage in failed]
            raise CheckError("verification failed\n  " + "\n  ".join(lines), file=self.path)


def _first(stage: StageResult) -> str:
    first, *rest = stage.complaints
    return f"{first} (and {len(rest)} more)" if rest else first


def verify(
    file: HfqFile,
    backend: Backend,
    inputs: VerifyInputs,
    on_stage: Callable[[StageResult], None] = lambda _: None,
    watch: Watch = UNWATCHED,
) -> Verification:
    """Run every stage that there are inputs for; `on_stage` hears of each as it ends, `watch` of the work in it."""
    done: list[Stage] = []
    skipped: dict[str, str] = {}
    cfg = _config(file)

    def finish(*stages: Stage) -> None:
        for stage in stages:
            done.append(stage)
            on_stage(stage.result)

    def run(name: str, work: Callable[[], StageResult]) -> None:
        stage = Stage(name)
        stage.end(work)
        finish(stage)

    source, tokens, prompt, bars = inputs.source, inputs.tokens, inputs.prompt, inputs.bars
    run("structure", lambda: _structure(file, source, watch))
    run("decode", lambda: check_decode(file, backend, inputs.sample, watch))
    if cfg is None:
        skipped |= dict.fromkeys(("forward", "fidelity", "predictions"), "the file's config cannot be read")
    else:
        if tokens is None:
            skipped["forward"] = skipped["predictions"] = NO_TOKENS
        else:
            few = tokens if inputs.dump else tokens[:1, :POSITIONS]
            run("forward", lambda: check_forward(file, cfg, backend, few, inputs.dump, watch))
        if source is None:
            skipped["fidelity"] = "no source to compare with; give --source"
            skipped.setdefault("predictions", skipped["fidelity"])
        else:
            comparison = SourceComparison(
                file, source, cfg, inputs.imatrix, sampled(file) if inputs.sample else None
            )
            judged = None if inputs.unjudged else tokens
            finish(*comparison.run(judged, bars, inputs.fewest, inputs.notes, watch))
            if inputs.unjudged:
                skipped["predictions"] = inputs.unjudged
    if cfg is None or inputs.generate == 0 or prompt is None or not prompt.size:
        skipped["generation"] = "no prompt, or no tokens were asked for"
    else:
        run(
            "generation",
            lambda: check_generation(file, cfg, backend, prompt, inputs.generate, bars.coherence, watch),
        )
    seconds = {stage.name: stage.seconds for stage in done}
    stages = tuple(stage.result for stage in done)
    return Verification(file.path, stages, skipped, seconds, peak_rss(), FileFacts.of(file), bars)


def _config(file: HfqFile) -> ModelConfig | None:
    config = file.metadata.get("config")
    try:
        return parse_config(config) if isinstance(config, Mapping) else None
    except MqError:
        return None


def _structure(file: HfqFile, source: Source | None, watch: Watch) -> StageResult:
    """The structure stage, how the engine splits texts, and whether config and tokenizer are those of a source."""
    stage = check_structure(file, watch)
    stage = replace(stage, notes=(*stage.notes, *split_notes(file)))
    if source is None:
        return stage
    return replace(stage, problems=(*stage.problems, *_differs(file, source)))


def _differs(file: HfqFile, source: Source) -> list[str]:
    found, expected = file.metadata.get("config"), normalize_config(source.raw_config)
    if not isinstance(found, Mapping):
        return []
    problems = [
        f"metadata.config.{key}: is {shown(found.get(key))}, the source has {shown(expected.get(key))}"
        for key in sorted({*found, *expected})
        if found.get(key) != expected.get(key)
    ]
    tokenizer = source.side_file(TOKENIZER)
    if tokenizer is not None and file.metadata.get("tokenizer") != tokenizer.read_text("utf-8"):
        problems.append("metadata.tokenizer: is not the source's tokenizer.json")
    return problems
