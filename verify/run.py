"""All stages of `mq-quant verify` in order, and one result object.

A stage that cannot run is a failed stage, and one that was not asked for is listed as skipped, with the reason: no
verdict is given on what was not looked at. Depends on all of verify.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..formats.checkpoint.source import Source
from ..formats.errors import CheckError, MqError
from ..formats.hfq import HfqFile
from ..formats.minimax import ModelConfig, normalize_config, parse_config
from ..formats.statistics.imatrix import Imatrix
from ..kernels.runtime.host import Backend
from .bars import Bars
from .stages.decode_parity import check_decode, sampled
from .stages.fidelity import check_fidelity
from .stages.forward_parity import check_forward
from .stages.generation import check_generation
from .stages.stage import Stage
from .stages.structure import check_structure


@dataclass(frozen=True)
class Request:
    """What to verify a file against; `tokens` i64 [n_seq, len] for the forward pass, None where there are none."""

    source: Source | None = None
    imatrix: Imatrix | None = None
    tokens: NDArray[np.int64] | None = None
    prompt: NDArray[np.int64] | None = None
    bars: Bars = field(default_factory=Bars)
    sample: bool = False
    generate: int = 0
    dump: Path | None = None


@dataclass(frozen=True)
class Verdict:
    """The result of all stages that ran, in order, and why others did not."""

    path: Path
    stages: tuple[Stage, ...]
    skipped: Mapping[str, str]
    seconds: Mapping[str, float]

    @property
    def ok(self) -> bool:
        return bool(self.stages) and all(stage.ok for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "ok": self.ok,
            "stages": [{**s.as_json(), "seconds": round(self.seconds[s.name], 3)} for s in self.stages],
            "skipped": dict(self.skipped),
            "peak_rss_bytes": _peak_rss(),
        }

    def raise_if_failed(self) -> None:
        """CheckError that names the first problem of each failed stage."""
        failed = [stage for stage in self.stages if not stage.ok]
        if not self.stages:
            raise CheckError("no stage ran, so nothing is known of it", file=self.path)
        if failed:
            lines = [f"{stage.name}: {_first(stage)}" for stage in failed]
            raise CheckError("verification failed\n  " + "\n  ".join(lines), file=self.path)


def _first(stage: Stage) -> str:
    first, *rest = stage.complaints
    return f"{first} (and {len(rest)} more)" if rest else first


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def verify(
    file: HfqFile, backend: Backend, request: Request, on_stage: Callable[[Stage], None] = lambda _: None
) -> Verdict:
    """Run every stage that the request has the means for; `on_stage` hears of each as it ends."""
    stages: list[Stage] = []
    seconds: dict[str, float] = {}
    skipped: dict[str, str] = {}
    cfg = _config(file)

    def run(name: str, stage: Callable[[], Stage], before: Callable[[], None] = lambda: None) -> None:
        began = time.monotonic()
        try:
            before()
            result = stage()
        except MqError as e:
            result = Stage(name, 0, "results", (str(e),))
        seconds[name] = time.monotonic() - began
        stages.append(result)
        on_stage(result)

    source, tokens = request.source, request.tokens
    run("structure", lambda: _structure(file, source))
    run("decode", lambda: check_decode(file, backend, request.sample))
    if source is None:
        skipped["fidelity"] = skipped["forward"] = "no source to compare with; give --source"
    elif cfg is None:
        skipped["fidelity"] = skipped["forward"] = "the file's config cannot be read"
    else:
        chosen = sampled(file) if request.sample else None
        alike = partial(check_dimensions, file, cfg, source.config)
        run("fidelity", lambda: check_fidelity(file, source, cfg, request.imatrix, chosen), alike)
        if tokens is None:
            skipped["forward"] = "no tokens to run; give --tokens, --prompt or --token-file"
        else:
            ids = tokens
            dump, bars = request.dump, request.bars
            run("forward", lambda: check_forward(file, source, cfg, backend, ids, bars, dump), alike)
    if cfg is None or request.generate == 0 or request.prompt is None or not request.prompt.size:
        skipped["generation"] = "no prompt, or no tokens were asked for"
    else:
        prompt, model = request.prompt, cfg
        run(
            "generation",
            lambda: check_generation(file, model, backend, prompt, request.generate, request.bars.coherence),
        )
    return Verdict(file.path, tuple(stages), skipped, seconds)


DIMENSIONS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "num_local_experts",
    "num_experts_per_tok",
)
"""The keys of a config that decide how many tensors there are, their shapes, and the shapes of what flows through."""


def check_dimensions(file: HfqFile, cfg: ModelConfig, source: ModelConfig) -> None:
    """CheckError where a file is of a model of other dimensions than the source: nothing can be compared then."""
    different = [
        f"{name} is {getattr(cfg, name)}, the source's {getattr(source, name)}"
        for name in DIMENSIONS
        if getattr(cfg, name) != getattr(source, name)
    ]
    if different:
        raise CheckError(f"cannot be compared with the source: {'; '.join(different)}", file=file.path)


def _config(file: HfqFile) -> ModelConfig | None:
    config = file.metadata.get("config")
    try:
        return parse_config(config) if isinstance(config, Mapping) else None
    except MqError:
        return None


def _structure(file: HfqFile, source: Source | None) -> Stage:
    """The structure stage, and, with a source, whether the file's config and tokenizer are the source's."""
    stage = check_structure(file)
    if source is None:
        return stage
    return Stage(
        stage.name,
        stage.seen,
        stage.unit,
        (*stage.problems, *_differs(file, source)),
        stage.notes,
        stage.values,
    )


def _differs(file: HfqFile, source: Source) -> list[str]:
    found, expected = file.metadata.get("config"), normalize_config(source.raw_config)
    if not isinstance(found, Mapping):
        return []
    problems = [
        f"metadata.config.{key}: is {found.get(key)!r}, the source has {expected.get(key)!r}"
        for key in sorted({*found, *expected})
        if found.get(key) != expected.get(key)
    ]
    tokenizer = source.side_file("tokenizer.json")
    if tokenizer is not None and file.metadata.get("tokenizer") != tokenizer.read_text("utf-8"):
        problems.append("metadata.tokenizer: is not the source's tokenizer.json")
    return problems
