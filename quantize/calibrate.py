"""Calibration: the source runs on tokens, layer by layer, and each layer's second moments are written as it is done.

All tokens pass through one layer before the next is read, so that a streamed checkpoint is read once and memory holds
the activations of one layer. Depends on verify.reference, moments, calibration_folder, progress and formats.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..formats.calibration import DownForm, config_record
from ..formats.checkpoint import Source
from ..formats.errors import BackendError, CalibrationError, CheckpointError
from ..formats.minimax import ModelConfig, TensorSpec, layer_inventory
from ..verify.reference import embed, layer_forward
from .build import peak_rss
from .calibration_folder import CalibrationFolder
from .calibration_plan import estimate
from .moments import LayerMoments
from .progress import Progress
from .provenance import flatten, program
from .recipe import Recipe
from .requantised import Stored

LENGTH = 512
"""Tokens per sequence where a text is cut up."""
EMBED = "model.embed_tokens.weight"

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class CalibrationOptions:
    """How a calibration runs. `down`, `propagate` and, in the last bits, `device` decide its bytes; the rest does not.

    With a recipe in `propagate` each layer sees what the layers before it put out as that recipe stores them.
    """

    down: DownForm = "compact"
    propagate: Recipe | None = None
    device: str = "cpu"
    jobs: int = 1
    force: bool = False
    restart: bool = False
    quiet: bool = False


def read_tokens(path: Path, config: ModelConfig, sequences: int | None = None) -> Tokens:
    """Token ids i32 [sequences, length] of a .npy file, the first `sequences` of them; CalibrationError."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise CalibrationError(f"cannot be read as a .npy file: {e}", file=path) from None
    if (
        not isinstance(tokens, np.ndarray)
        or tokens.ndim != 2
        or tokens.dtype.kind not in "iu"
        or not tokens.size
    ):
        shape = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, np.ndarray) else "an archive"
        raise CalibrationError(f"holds {shape}, not whole numbers [sequences, length]", file=path)
    return check_tokens(_first(tokens, sequences, path), config, path)


def tokenize(path: Path, source: Source, length: int = LENGTH, sequences: int | None = None) -> Tokens:
    """A UTF-8 text as token ids i32 [sequences, length], cut one after the other; the rest is dropped.

    Raises CalibrationError where the text is shorter than asked, or than one sequence.
    """
    from tokenizers import Tokenizer

    side = source.side_file("tokenizer.json")
    if side is None:
        raise CheckpointError("has no tokenizer.json, which --text needs", hint="give --tokens instead")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CalibrationError(f"cannot be read as UTF-8 text: {e}", file=path) from None
    try:
        ids = Tokenizer.from_file(str(side)).encode(text, add_special_tokens=False).ids
    except Exception as e:  # the package raises plain Exception for files that it cannot use
        raise CalibrationError(f"the tokenizer cannot be used: {e}", file=side) from None
    whole = len(ids) // length
    if whole < (sequences or 1):
        raise CalibrationError(
            f"is {len(ids)} tokens, shorter than {sequences or 1} sequences of {length}",
            file=path,
            hint="give more text, or ask for less with --sequences and --length",
        )
    cut = np.array(ids[: whole * length], np.int64).reshape(whole, length)
    return check_tokens(_first(cut, sequences, path), source.config, path)


def _first(tokens: NDArray[Any], sequences: int | None, path: Path) -> NDArray[Any]:
    if sequences is not None and len(tokens) < sequences:
        raise CalibrationError(
            f"holds {len(tokens)} sequences, fewer than the {sequences} asked for",
            file=path,
            hint="give more text, or ask for less with --sequences",
        )
    return tokens if sequences is None else tokens[:sequences]


def check_tokens(tokens: NDArray[Any], config: ModelConfig, path: Path) -> Tokens:
    """Ids as i32; CalibrationError for ids outside the vocabulary and sequences longer than the model's positions."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise CalibrationError(
            f"holds token {wrong}, outside the vocabulary of {config.vocab_size}",
            file=path,
            hint="the tokens are of another model's tokenizer",
        )
    if tokens.shape[1] > config.max_position_embeddings:
        raise CalibrationError(
            f"has sequences of {tokens.shape[1]}, the model {config.max_position_embeddings} positions",
            file=path,
        )
    return np.ascontiguousarray(tokens, np.int32)


def token_record(tokens: Tokens) -> dict[str, Any]:
    """What a manifest says of its tokens."""
    digest = hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()
    return {"sha256": digest, "sequences": tokens.shape[0], "length": tokens.shape[1]}


@dataclass
class Reading:
    """The source seen from one layer: counts what is read, and where it is read `once` releases it thereafter."""

    source: Source
    progress: Progress
    layer: int
    once: bool
    read: int = 0
    released: set[str] = field(default_factory=set)

    def weight(self, name: str) -> NDArray[np.float32]:
        values = self.source.weight(name)
        self.read += values.size
        self.progress.advance(values.size, f"layer {self.layer}")
        if self.once:
            self.source.release(name)
            self.released.add(name)
        return values

    def finish(self, specs: list[TensorSpec]) -> None:
        """Release what is left of the layer: experts that no token chose, or all of it."""
        for spec in specs:
            if spec.name not in self.released:
                self.source.release(spec.name)
        self.progress.advance(weights_of(specs) - self.read, f"layer {self.layer}")


def weights_of(specs: list[TensorSpec]) -> int:
    return sum(int(np.prod(spec.shape)) for spec in specs)


def open_device(name: str) -> torch.device:
    """cpu, or cuda (ROCm is cuda to torch); BackendError where torch has no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendError("torch sees no GPU", hint="use --device cpu, or install torch for this GPU")
    return torch.device(name)


def calibrate(source: Source, tokens: Tokens, folder: Path, options: CalibrationOptions) -> dict[str, Any]:
    """Gather the second moments of every layer into `folder`, or continue there; returns what `--json` prints.

    Raises OutputError, ResumeError or CalibrationError before any work where the folder or the tokens cannot be used.
    """
    began = time.monotonic()
    config, device = source.config, open_device(options.device)
    manifest = {
        "program": {"mq-quant": program()["version"], "torch": torch.__version__},
        "device": options.device,
        "config": config_record(config),
        "source": {"origin": source.origin, "files": source.fingerprint()},
        "tokens": token_record(tokens),
        "down": options.down,
        "propagate": options.propagate.resolved() if options.propagate else "source",
    }
    sizes = estimate(config, tokens.size, options.down)
    needed = sizes["folder_bytes"] + 2 * sizes["unfinished_bytes"] + source.disk_bytes()
    with CalibrationFolder(folder, dict(flatten(manifest)), options.force, options.restart) as out:
        out.check_space(needed)
        records = out.done()
        resumed = len(records)
        _run(source, tokens, out, options, records, device)
        out.complete(config, manifest, records)
    seen = sum(config.num_local_experts - len(r["unseen"]) for r in records)
    return {
        "path": str(folder),
        "layers": len(records),
        "resumed_layers": resumed,
        "tokens": int(tokens.size),
        "coverage": seen / (config.num_local_experts * len(records)),
        "notes": [note for record in records for note in record["notes"]],
        "folder_bytes": sum(f.stat().st_size for f in folder.iterdir()),
        "seconds": round(time.monotonic() - began, 3),
        "peak_rss_bytes": peak_rss(),
        "estimate": sizes,
    }


def _run(
    source: Source,
    tokens: Tokens,
    out: CalibrationFolder,
    options: CalibrationOptions,
    records: list[dict[str, Any]],
    device: torch.device,
) -> None:
    """Run the layers that `records` does not hold yet, and add theirs."""
    config, first = source.config, len(records)
    if first == config.num_hidden_layers:
        return
    layers = {n: list(layer_inventory(config, n)) for n in range(config.num_hidden_layers)}
    names = [spec.name for n in range(first, config.num_hidden_layers) for spec in layers[n]]
    source.schedule(names if first else [EMBED, *names])
    stored = Stored(source, config, options.propagate, options.jobs) if options.propagate else None
    hidden = start(source, stored, out, tokens, first).to(device)
    total = sum(map(weights_of, layers.values()))
    before = sum(weights_of(layers[n]) for n in range(first))
    with (
        Progress(f"calibrate {out.path.name}", total, before, options.quiet) as progress,
        torch.inference_mode(),
    ):
        for layer in range(first, config.num_hidden_layers):
            last = layer + 1 == config.num_hidden_layers
            reading = Reading(source, progress, layer, once=stored is None)
            moments = LayerMoments(config, layer, options.down)
            behind = layer_forward(reading, config, layer, hidden, moments)
            arrays = moments.finish()
            record = {
                **out.write_layer(layer, arrays),
                "tokens": int(arrays["gate_up.tokens"][0]),
                "unseen": moments.unseen,
                "notes": moments.notes,
            }
            if stored and not last:
                behind = stored.forward(out.layer(layer, config, options.down), hidden)
            hidden = behind
            reading.finish(layers[layer])
            out.finish_layer(layer, None if last else hidden.cpu().numpy(), record)
            records.append(out.journal.done[f"layer.{layer}"])


def start(
    source: Source, stored: Stored | None, out: CalibrationFolder, tokens: Tokens, first: int
) -> Tensor:
    """The residual stream f32 [sequences, length, hidden] that enters layer `first`."""
    if first:
        return torch.from_numpy(out.hidden(first, (*tokens.shape, source.config.hidden_size)))
    hidden = embed(stored or source, tokens)
    source.release(EMBED)
    return hidden
