"""One layer of a calibration: the source runs on all tokens, and what it leaves behind is made durable.

Shared by `calibrate`, which gathers all layers into a folder, and by builds that gather each layer before they encode
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ...awq.importance import LayerImportance
from ...formats.errors import BackendError
from ...formats.minimax import ModelConfig, layer_inventory
from ...formats.statistics.moment_file import DownForm
from ...formats.statistics.moment_folder import config_record
from ...verify.model.device_weights import DeviceWeights, StoredWeights
from ...verify.model.lanes import NO_LANES, Lanes
from ...verify.model.reference import SILENT, Observer, Weights, embed, layer_forward
from ...verify.model.spread_forward import EXPERTS, spread_forward
from ..encode.on_device.transfer import pieces_of
from ..spec.calibration_sizes import layers_bytes
from ..spec.provenance import program
from .folder import CalibrationFolder
from .moments import LayerMoments
from .tokens import Tokens, token_record

EMBED = "model.embed_tokens.weight"


def open_device(name: str) -> torch.device:
    """cpu, or cuda (ROCm is cuda to torch): the first GPU with those like it beside it, or one by its number, as in
    cuda:1. BackendError where torch has no such device.
    """
    if name != "cpu" and not torch.cuda.is_available():
        raise BackendError("torch sees no GPU", hint="use --device cpu, or install torch for this GPU")
    return torch.device(name)


def with_others(first: torch.device) -> tuple[torch.device, ...]:
    """A device with the other GPUs of its kind, on which sums are the same; alone where it was named by its number."""
    if str(first) != "cuda":
        return (first,)
    kind = torch.cuda.get_device_name(0)
    alike = [n for n in range(1, torch.cuda.device_count()) if torch.cuda.get_device_name(n) == kind]
    return (first, *(torch.device("cuda", n) for n in alike))


def make_room(devices: Sequence[torch.device], most: float = 0.5) -> None:
    """Give back what torch holds in reserve where that is more than this share of a GPU's memory: the encoder takes
    memory too.
    """
    gpus = [device for device in devices if device.type == "cuda"]
    if any(torch.cuda.memory_reserved(d) > most * torch.cuda.mem_get_info(d)[1] for d in gpus):
        torch.cuda.empty_cache()


def layers_held(config: ModelConfig, tokens: int, devices: Sequence[torch.device]) -> int:
    """How many layers lie on devices at once, where there is room: one that is encoded, the next one, which is run
    meanwhile, and on several devices the one after that too: there a layer may be encoded sooner than the next one is
    run and its encoder prepared.
    """
    most = 3 if len(devices) > 1 else 2
    if devices[0].type != "cuda":
        return most
    _, total = torch.cuda.mem_get_info(devices[0])
    return max(n for n in range(1, most + 1) if n == 1 or layers_bytes(config, tokens, n) < 0.85 * total)


def beside_others(devices: Sequence[torch.device]) -> Callable[[], AbstractContextManager[object]]:
    """What makes the work of a thread on devices wait for none of other threads: the same streams each time."""
    streams = [torch.cuda.Stream(d) for d in devices if d.type == "cuda"]  # type: ignore[no-untyped-call]

    @contextmanager
    def beside() -> Iterator[None]:
        with ExitStack() as entered:
            for stream in reversed(streams):  # the first device is the current one then
                entered.enter_context(torch.cuda.stream(stream))
            yield

    return beside


class Propagation(Protocol):
    """What turns a layer's input into the next one's, where that is not the source itself."""

    def forward(self, importance: LayerImportance, hidden: Tensor) -> Tensor: ...


def layer_weights(
    source: StoredWeights, devices: Sequence[torch.device], layer: int
) -> AbstractContextManager[Weights | DeviceWeights]:
    """The weights of a layer for a forward pass on devices: on GPUs they are read ahead, and travel as FP8."""
    if devices[0].type == "cpu":
        return nullcontext(source)
    return closing(device_weights(source, devices, layer))


def layers_in_turn(
    source: StoredWeights, devices: Sequence[torch.device], layers: Sequence[int]
) -> Iterator[tuple[int, Weights | DeviceWeights]]:
    """The weights of layers, one after the other; on GPUs the next one's are read meanwhile. Whoever asks for the next
    ones has waited for the devices.
    """
    with ExitStack() as last:
        coming: list[tuple[ExitStack, Weights | DeviceWeights]] = []

        def begin(layer: int) -> None:
            opened = ExitStack()
            last.callback(opened.close)
            coming.append((opened, opened.enter_context(layer_weights(source, devices, layer))))

        for place, layer in enumerate(layers):
            if not coming:
                begin(layer)
            if place + 1 < len(layers):
                begin(layers[place + 1])
            opened, weights = coming.pop(0)
            yield layer, weights
            opened.close()


def device_weights(source: StoredWeights, devices: Sequence[torch.device], layer: int) -> DeviceWeights:
    """The weights of a layer, on their way to devices."""
    return DeviceWeights(source, devices, [spec.name for spec in layer_inventory(source.config, layer)])


def run_source(
    weights: Weights | DeviceWeights,
    config: ModelConfig,
    layer: int,
    hidden: Tensor,
    observer: Observer = SILENT,
    lanes: Lanes = NO_LANES,
) -> Tensor:
    """The residual stream behind a layer, on the device of the one that enters it; it runs where its weights lie, in
    `lanes` as `spread_forward` does.
    """
    if isinstance(weights, DeviceWeights):
        return spread_forward(weights, config, layer, hidden, observer, lanes)
    return layer_forward(weights, config, layer, hidden, observer)


def device_record(device: torch.device) -> dict[str, str]:
    """What a manifest says of the device: sums differ in their last bits from one kind of GPU to another."""
    if device.type != "cuda":
        return {"device": device.type}
    return {"device": device.type, "gpu": torch.cuda.get_device_name(device)}


def manifest_of(
    config: ModelConfig,
    source: Mapping[str, Any],
    tokens: Tokens,
    down: DownForm,
    device: torch.device,
    propagate: Mapping[str, Any] | str = "source",
) -> dict[str, Any]:
    """A manifest without its layers: everything that decides what is gathered. `source` is {origin, files}."""
    return {
        "program": {"mq-quant": program()["version"], "torch": torch.__version__},
        **device_record(device),
        "config": config_record(config),
        "source": dict(source),
        "tokens": token_record(tokens),
        "down": down,
        "propagate": propagate,
    }


def enter(
    weights: Weights, config: ModelConfig, out: CalibrationFolder, tokens: Tokens, layer: int
) -> Tensor:
    """The residual stream f32 [sequences, length, hidden] that enters a layer: embedded, or as it was saved."""
    if layer:
        return torch.from_numpy(out.hidden(layer, (*tokens.shape, config.hidden_size)))
    return embed(weights, tokens)


@dataclass(frozen=True)
class Gathered:
    """A layer that was run: the residual stream `behind` it, the inputs of its experts and who took them (f32
    [n, hidden] and i64 [n, k], where they were to be kept), and what the journal says of it after `finish`.

    Its moments are durable. `finish`, which may be called on another thread, makes the stream so, then the journal.
    """

    behind: Tensor
    rows: tuple[Tensor, Tensor] | None
    record: dict[str, Any]
    finish: Callable[[], None]


def gather_layer(
    weights: Weights | DeviceWeights,
    config: ModelConfig,
    layer: int,
    hidden: Tensor,
    out: CalibrationFolder,
    down: DownForm,
    propagation: Propagation | None = None,
    after: Callable[[], None] = lambda: None,
    keep_rows: Literal["on disk", "here"] | None = None,
    keep_last: bool = False,
    keep_entering: bool = False,
) -> Gathered:
    """Run a layer and write its moments; what is left to be written is so by the `finish` of what is returned. It runs
    where its weights lie, and all that is returned lies on the first of these devices.

    What the experts saw is kept in a file, or where it is; then the stream that enters the layer stays too, from which
    it can be made again, as it does with `keep_entering`. `keep_last` keeps the stream behind the last layer, which no
    layer needs. `after` is called when no weight of the layer is needed any more.
    """
    last = layer + 1 == config.num_hidden_layers
    at_once = EXPERTS * len(weights.devices) if isinstance(weights, DeviceWeights) else 1
    moments = LayerMoments(config, layer, down, keep_rows is not None, at_once)
    with torch.inference_mode():
        behind = run_source(weights, config, layer, hidden, moments)
        arrays = moments.finish()
        record = {
            **out.write_layer(layer, arrays),
            "tokens": int(arrays["gate_up.tokens"][0]),
            "unseen": moments.unseen,
            "notes": moments.notes,
        }
        if keep_rows == "on disk" and moments.rows is not None:
            inputs, experts = moments.rows
            record["rows"] = out.write_rows(
                layer, {"inputs": inputs.cpu().numpy(), "experts": experts.cpu().numpy()}
            )
        if propagation and not last:
            behind = propagation.forward(out.layer(layer, config, down), hidden)
        after()

    def finish() -> None:
        kept = None if last and not keep_last else pieces_of(behind)
        out.finish_layer(layer, kept, record, keep_entering=keep_entering or keep_rows == "here")

    return Gathered(behind, moments.rows, record, finish)
