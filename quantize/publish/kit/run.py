"""Our own kernels over a kit: the hidden states and logits of a model, and single products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....formats.errors import CheckError, MqError
from ....formats.hfq import HfqFile, open_hfq
from ....formats.minimax import ModelConfig, parse_config
from ....formats.watch import UNWATCHED, Watch
from ....kernels.forward import ops
from ....kernels.runtime.host import Backend
from ....verify.model.kernel_forward import KernelModel
from .check_kit import GROUP, Judgement, KitError, judge, read_manifest
from .dump import write_hidden
from .vectors import ROWS, Vector

F32 = NDArray[np.float32]


class BrokenKitError(MqError):
    """A folder that is no conformance kit, or not a whole one."""


@dataclass(frozen=True)
class Ran:
    """Of one prompt: the states f32 [layers, len, hidden] after each layer, and logits f32 [len, vocabulary]."""

    states: F32
    logits: F32


def run_model(file: HfqFile, config: ModelConfig, backend: Backend, tokens: NDArray[np.integer]) -> Ran:
    """Run token ids [len] through a model."""
    model = KernelModel(file, config, backend, len(tokens))
    state, states = model.embed(tokens), []
    for layer in range(config.num_hidden_layers):
        model.layer(layer, [state], [model.positions(0, len(tokens))], [model.cache()])
        states.append(backend.download(state).copy())
    (values,) = model.logits([state])
    return Ran(np.stack(states), values)


def product(backend: Backend, kernel: str, v: Vector) -> F32:
    """One product f32 [ROWS] by the kernel of that name."""
    x = backend.upload(v.x[None])
    if kernel == "matvec":
        out = ops.matvec(backend, ops.matrix(backend, v.payload, v.format, ROWS, v.columns), x)
    else:
        ids, data = backend.upload(np.zeros((1, 1), np.int32)), backend.upload(v.payload)
        expert = ops.experts(backend, data, [0], v.format, ROWS, v.columns)
        if kernel == "gate-up":
            out, _ = ops.expert_gate_up(backend, expert, expert, ids, x)
        else:
            out = ops.expert_down(backend, expert, ids, x.reshape(1, 1, v.columns))
    result: F32 = backend.download(out).reshape(ROWS)
    return result


@dataclass(frozen=True)
class CheckedKit:
    """A kit that was run here: where, on what, and how it was judged."""

    kit: Path
    device: str
    judgement: Judgement

    def as_json(self) -> dict[str, Any]:
        """What `kit --check --json` prints."""
        return {
            "kit": str(self.kit),
            "device": self.device,
            "ok": not self.judgement.findings,
            **asdict(self.judgement),
            "named": list(self.judgement.named),
        }

    def raise_if_failed(self) -> None:
        """CheckError that names the first departure."""
        if found := self.judgement.findings:
            raise CheckError(f"{len(found)} results depart, the first: {found[0].where}", file=self.kit)


def check_kit(kit: Path, results: Path, backend: Backend, watch: Watch = UNWATCHED) -> CheckedKit:
    """Run a kit on a back end, leave what comes out in the folder `results`, and judge it.

    Raises BrokenKitError where the kit cannot be read.
    """
    try:
        results.mkdir(parents=True, exist_ok=True)
        return CheckedKit(kit, backend.device, _check(kit, results, backend, watch))
    except (KitError, LookupError, TypeError, ValueError, AttributeError) as e:
        raise BrokenKitError(
            f"is no whole kit: {e}", file=kit, hint="make it again with mq-quant kit --out"
        ) from None
    except OSError as e:
        raise BrokenKitError(f"cannot be used: {e}", file=kit) from None


def _check(kit: Path, results: Path, backend: Backend, watch: Watch) -> Judgement:
    manifest = read_manifest(kit)
    watch.begin("kit", len(manifest["models"]) + 1, "files")
    for kernel, formats in manifest["vectors"]["kernels"].items():
        made = [
            product(backend, kernel, v) for v in _vectors(kit, manifest["vectors"]) if v.format in formats
        ]
        np.concatenate(made).astype("<f4").tofile(results / f"vectors.{kernel}.f32")
    watch.advance(1, "products")
    for model in manifest["models"]:
        with open_hfq(kit / model["name"] / model["file"]) as file:
            config = parse_config(file.metadata.get("config") or {})
            for prompt in model["prompts"]:
                ran = run_model(file, config, backend, np.array(prompt["tokens"]))
                name = f"{model['name']}.{prompt['name']}"
                write_hidden(results / f"{name}.hfhs", ran.states)
                ran.logits.astype("<f4").tofile(results / f"{name}.logits.f32")
        watch.advance(1, model["name"])
    return judge(kit, results)


def _vectors(kit: Path, described: Mapping[str, Any]) -> Iterator[Vector]:
    """The products of a kit as its file holds them."""
    raw = np.fromfile(kit / described["file"], np.uint8)
    for entry in described["list"]:
        columns = entry["columns"]
        payload = raw[entry["payload"] : entry["payload"] + entry["payload_bytes"]]
        x = raw[entry["x"] : entry["x"] + 4 * columns].view("<f4").astype(np.float32)
        parts = raw[entry["parts"] :][: 4 * ROWS * columns // GROUP].view("<f4").reshape(ROWS, -1)
        yield Vector(entry["format"], columns, payload, x, parts)
