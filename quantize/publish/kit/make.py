"""Writes a kit: models, prompts, what the reference and our kernels give, what known faults give, and the runner."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ....formats.engine_facts import WARNED, engine_facts
from ....formats.errors import OutputError
from ....formats.hfq import open_hfq
from ....formats.minimax import ModelConfig, parse_config
from ....formats.own_file import disk_errors
from ....formats.watch import UNWATCHED, Watch
from ....kernels.runtime.host import Backend
from ....verify.model.metrics import cosine
from ....verify.model.reference import layer_by_layer, logits
from .dump import write_hidden
from .run import run_model
from .shapes import PROMPTS, KitModel, kit_models
from .suspects import FAULTS, Fault, HeldFile, faulty_states
from .vectors import FORMATS, KERNELS, ROWS, vectors
from .weights import write_model

RUNNER, MANIFEST, README = "check_kit.py", "kit.json", "README.md"
BAR = 0.9995
"""The cosine that every position of a layer must reach. Engines that are right reach 0.9999, known faults far less."""
VISIBLE = 0.999
"""A fault shows on a prompt where a position's cosine is under this."""
POSITIONS = 4
"""The last positions of a prompt for which a fault's states are kept."""

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class KitResult:
    """What was written: the models by name, the bytes of all files together."""

    folder: Path
    models: tuple[str, ...]
    files: int
    bytes: int

    def as_json(self) -> dict[str, Any]:
        """What `kit --json` prints."""
        return {**asdict(self), "folder": str(self.folder), "models": list(self.models)}


def write_kit(
    folder: Path,
    backend: Backend,
    models: Sequence[KitModel] | None = None,
    formats: Sequence[str] = FORMATS,
    force: bool = False,
    watch: Watch = UNWATCHED,
) -> KitResult:
    """Write a kit into a new folder, our kernels run by `backend`; the folder appears only when it is whole.

    `models` are those of `kit_models` where none are given, and `formats` those of single products.

    Raises OutputError where the folder exists (without `force`) and where the disk fails.
    """
    chosen = tuple(models or kit_models())
    if folder.exists() and not force:
        raise OutputError("exists already", file=folder, hint="give --force to replace it, or another folder")
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise OutputError("is no kit, so it is not replaced", file=folder, hint="give another folder")
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _fill(unfinished, backend, chosen, formats, watch)
            unfinished.chmod(0o755)
            if folder.exists():
                shutil.rmtree(folder)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return KitResult(folder, tuple(model.name for model in chosen), len(sizes), sum(sizes))


def _fill(
    folder: Path, backend: Backend, models: Sequence[KitModel], formats: Sequence[str], watch: Watch
) -> None:
    watch.begin("kit", len(models), "files")
    described = []
    for model in models:
        described.append(_model(folder / model.name, model, backend))
        watch.advance(1, model.name)
    manifest = {"schema": 1, "models": described, "vectors": _vectors(folder, formats)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    ours = resources(__name__.rpartition(".")[0])
    for name, source in ((RUNNER, RUNNER), (README, "README.md.jinja")):
        text = ours.joinpath(source).read_text("utf-8")
        (folder / name).write_text(_readme(text, models) if name == README else text, encoding="utf-8")


def _readme(text: str, models: Sequence[KitModel]) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    facts = [fact for state in WARNED for fact in engine_facts() if fact.state == state]
    return environment.from_string(text).render(
        models=models, prompts=PROMPTS, faults=FAULTS, kernels=KERNELS, rows=ROWS, facts=facts, bar=BAR
    )


# --- models ---------------------------------------------------------------------------------------------------------


def _model(folder: Path, model: KitModel, backend: Backend) -> dict[str, Any]:
    folder.mkdir()
    path = folder / f"{model.name}.hfq"
    write_model(model, path)
    config = parse_config(model.config())
    with open_hfq(path) as file:
        held = HeldFile(file)
        prompts = [_prompt(folder, name, held, config, backend) for name in PROMPTS]
    return {
        "name": model.name,
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "formats": [list(pair) for pair in model.layers],
        **asdict(model.shape),
        "bar": BAR,
        "prompts": prompts,
    }


def _prompt(folder: Path, name: str, held: HeldFile, config: ModelConfig, backend: Backend) -> dict[str, Any]:
    tokens = np.array(PROMPTS[name])
    with torch.inference_mode():
        streams = [s for _, s in layer_by_layer(held, config, tokens[None], dtype=torch.float64)]
        (values,) = logits(held, config, streams[-1])
    right = torch.cat(streams).float().numpy()
    ours = run_model(held.file, config, backend, tokens)
    write_hidden(folder / f"{name}.hfhs", right)
    write_hidden(folder / f"{name}.kernels.hfhs", ours.states)
    values.float().numpy().astype("<f4").tofile(folder / f"{name}.logits.f32")
    ours.logits.astype("<f4").tofile(folder / f"{name}.kernels.logits.f32")
    return {
        "name": name,
        "tokens": tokens.tolist(),
        "expected": f"{name}.hfhs",
        "kernels": f"{name}.kernels.hfhs",
        "logits": f"{name}.logits.f32",
        "kernels_logits": f"{name}.kernels.logits.f32",
        "suspect_positions": min(POSITIONS, len(tokens)),
        "suspects": _suspects(folder, name, held, config, tokens, right[0]),
    }


def _suspects(
    folder: Path, prompt: str, held: HeldFile, config: ModelConfig, tokens: NDArray[np.int64], right: F32
) -> list[dict[str, Any]]:
    """The faults that show on a prompt after the first layer, where `right` is f32 [positions, hidden]; those that give
    the same states share one entry.
    """
    found: list[tuple[F32, list[Fault]]] = []
    last = min(POSITIONS, len(tokens))
    for fault in FAULTS:
        states = faulty_states(held, config, tokens, fault)[-last:]
        if cosine(torch.from_numpy(states), torch.from_numpy(right[-last:])).min() >= VISIBLE:
            continue
        same = next((faults for other, faults in found if np.allclose(other, states, atol=1e-4)), None)
        if same is None:
            found.append((states, [fault]))
        else:
            same.append(fault)
    out = []
    for states, faults in found:
        name = f"{prompt}.{faults[0].id}.f32"
        states.astype("<f4").tofile(folder / name)
        named = [{"id": f.id, "projection": f.projection, "sentence": f.sentence} for f in faults]
        out.append({"states": name, "faults": named})
    return out


def _vectors(folder: Path, formats: Sequence[str]) -> dict[str, Any]:
    """Write vectors.bin, and describe it: byte offsets of each product's payload, x, parts and result."""
    listed, at = [], 0
    with (folder / "vectors.bin").open("wb") as f:
        for v in vectors(formats):
            result = v.parts.astype(np.float64).sum(1).astype("<f4")
            entry: dict[str, Any] = {
                "format": v.format,
                "columns": v.columns,
                "payload_bytes": v.payload.nbytes,
            }
            for key, part in (("payload", v.payload), ("x", v.x), ("parts", v.parts), ("result", result)):
                entry[key] = at
                at += f.write(np.ascontiguousarray(part).tobytes())
            listed.append(entry)
    return {
        "file": "vectors.bin",
        "rows": ROWS,
        "kernels": {k: [f for f in held if f in formats] for k, held in KERNELS.items()},
        "list": listed,
    }
