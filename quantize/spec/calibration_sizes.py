"""What a calibration takes, inside a build or as a folder of its own: memory at its peak, and disk."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ...formats.minimax import ModelConfig
from ...kernels.runtime.drivers import gpu_memory
from ...verify.evaluate import HEAD_ROWS

if TYPE_CHECKING:
    from ...formats.statistics.moment_file import DownForm

BASE_MEMORY = 900 << 20
"""Bytes that the interpreter and its libraries take."""
CHUNK = 4096
"""Rows of activations turned to f64 at a time by a calibration."""
BLOCK = 4
"""How many times CHUNK rows are turned to f64 at a time, where they are what down of several experts sees on a GPU."""
USUAL_TOKENS = 128 * 512
GPU_TOKENS = 1024 * 512
"""Tokens that a build calibrates on where nothing else is asked, on a CPU and on a GPU that has room for them."""
SENSITIVITY_TOKENS = 64 * 512
"""Tokens from which what errors behind each layer cost is found."""
SENSITIVITY_LENGTH = 512
"""Tokens of a sequence, for an estimate."""
GPU_ROWS = 13
"""How often a layer's stream lies on a GPU in f32 while the layer runs and its experts are rounded."""
ROUND = 8
"""Experts whose matrices lie on a GPU in f32 at once, with a copy of their codes, while the layer runs."""
GPU_STREAMS, SMALL_GPU = 8, 30 * 10**9
"""Streams of a GPU in which experts are rounded at a time; half of them where it has less memory than so many bytes."""
BESIDE = 4
"""Experts whose downs are rounded side by side in a stream."""
_BYTES = {"F32": 4, "F16": 2, "I64": 8}


@dataclass(frozen=True)
class CalibrationSizes:
    """Bytes that a calibration on `tokens` tokens takes: of memory at its peak, of one layer's file, of the finished
    folder, and of the residual stream that lies beside it until then."""

    tokens: int
    memory_bytes: int
    layer_bytes: int
    folder_bytes: int
    unfinished_bytes: int

    def as_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class WorkSizes:
    """Bytes that work on `tokens` tokens takes: of memory at its peak, and of disk beside its output."""

    tokens: int
    memory_bytes: int
    disk_bytes: int

    def as_json(self) -> dict[str, int]:
        return asdict(self)


def calibration_sizes(config: ModelConfig, tokens: int, down: DownForm) -> CalibrationSizes:
    """What a calibration on so many tokens takes, with down's moments kept in this form."""
    from ...formats.statistics.moment_file import layer_tensors

    h, i = config.hidden_size, config.intermediate_size
    stream = 4 * tokens * h
    moments = 8 * 3 * (h * h + 2 * i * i) + 8 * CHUNK * max(h, i)
    layer = sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in layer_tensors(config, down).values())
    table = 8 * config.vocab_size * h
    running = stream + _passing_bytes(config, tokens, moments) + layer
    memory = BASE_MEMORY + max(table + 2 * stream, running)
    return CalibrationSizes(tokens, memory, layer, layer * config.num_hidden_layers, stream)


def _passing_bytes(config: ModelConfig, tokens: int, moments: int = 0) -> int:
    """Bytes of memory that a layer takes in which a stream of so many tokens is, besides that stream: of its attention,
    or of the busiest expert and of `moments` that are gathered.
    """
    h, i = config.hidden_size, config.intermediate_size
    stream = 4 * tokens * h
    attention = 2 * stream + 4 * tokens * (3 * config.q_dim + 2 * config.kv_dim)
    busiest = min(tokens, 8 * -(-tokens * config.num_experts_per_tok // config.num_local_experts))
    expert = 4 * busiest * (2 * h + 3 * i) + 4 * 6 * h * i
    return max(attention, 3 * stream + expert + moments)


def evaluation_sizes(config: ModelConfig, tokens: int, models: int) -> WorkSizes:
    """What running `models` models on so many tokens takes, the source among them where it runs.

    Memory is that of one layer of one model, as a calibration has it without its moments, the source's stream behind
    the layer, and some rows of the vocabulary of each model at the head. The streams before and behind a layer lie on
    the disk.
    """
    stream = 4 * tokens * config.hidden_size
    layer = 3 * stream + _passing_bytes(config, tokens)
    head = 4 * HEAD_ROWS * config.hidden_size * (models + 1) + stream
    return WorkSizes(tokens, BASE_MEMORY + max(layer, head), 2 * models * stream)


STREAMS_AT_ONCE = 1 << 30
"""Bytes of memory that streams of a measurement take which pass a layer together."""


def stream_group(config: ModelConfig, tokens: int) -> int:
    """How many streams of so many tokens pass a layer together: each takes about a dozen times its size on the way."""
    return max(1, STREAMS_AT_ONCE // (12 * 4 * tokens * config.hidden_size))


def measuring_sizes(config: ModelConfig, tokens: int, formats: int, wholes: int, jobs: int) -> WorkSizes:
    """What measuring each piece in so many formats takes, on so many tokens, besides a calibration.

    Memory is that of the streams that are at one layer, and of an expert in all formats for each of the jobs. Streams
    lie on the disk, before and behind a layer.
    """
    stream = 4 * tokens * config.hidden_size
    begun, departing = 2 + wholes, 2 * formats
    expert = 4 * 3 * config.hidden_size * config.intermediate_size
    held = 1 + formats + (2 * formats + wholes) / 3
    rounded = stream * (4 * begun + departing) + round(held * expert) * (jobs + 1)
    memory = BASE_MEMORY + max(rounded, STREAMS_AT_ONCE, 12 * stream)
    streams = begun + departing * config.num_hidden_layers
    return WorkSizes(tokens, memory, 2 * streams * stream)


def gpu_streams(memory: int) -> int:
    """In how many streams of a GPU of so many bytes of memory experts are rounded; 0 bytes where that is not known."""
    return GPU_STREAMS // 2 if 0 < memory < SMALL_GPU else GPU_STREAMS


def stream_bytes(config: ModelConfig) -> int:
    """Bytes of a GPU's memory that the encoder of a stream takes for its own: rows of some downs side by side and what
    they miss, what rounding keeps of gate and up, sixteen numbers for each weight, and the Hessians' factors.
    """
    h, i = config.hidden_size, config.intermediate_size
    return h * i * (4 * (2 * BESIDE + 16) + 10) + 8 * h * h


def gpu_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of a GPU's memory that a build takes which calibrates itself on so many tokens, with one layer there."""
    return layers_bytes(config, tokens, 1)


def layers_bytes(config: ModelConfig, tokens: int, layers: int) -> int:
    """Bytes of a GPU's memory that such a build takes with so many layers there, one of which is encoded.

    Of torch's memory one layer of M2.7 took 19.2 GiB at 65,536 tokens and 77.6 at 524,288, and two took 24.0 and 88.4
    (`benchmarks/layer_pass.py`, one H200). To that comes what the encoder takes.
    """
    expert = 3 * config.hidden_size * config.intermediate_size
    stream = 4 * tokens * config.hidden_size
    weights = (2.5 * config.num_local_experts + (4 + 1) * ROUND) * expert
    # What down sees: twice a block waits in f32; a block lies joined, without what is not finite, and in f64.
    block = (2 * 4 + 4 + 4 + 8) * BLOCK * CHUNK * config.intermediate_size
    another = 1.2 * (config.num_local_experts * expert + stream)
    here = weights + block + GPU_ROWS * stream + (layers - 1) * another
    return round(here) + GPU_STREAMS * stream_bytes(config)


def usual_tokens(config: ModelConfig, device: str) -> int:
    """Tokens that a build calibrates on where nothing else is asked: on a GPU as many as its memory holds, up to
    GPU_TOKENS in halves.
    """
    if device == "cpu":
        return USUAL_TOKENS
    tokens, room = GPU_TOKENS, gpu_memory() or math.inf
    while tokens > USUAL_TOKENS and gpu_bytes(config, tokens) > 0.95 * room:
        tokens //= 2
    return tokens


def moment_bytes(config: ModelConfig, jobs: int) -> int:
    """Bytes of memory that rounding under full moments takes besides a build's own: of a layer, and of each worker."""
    h, i = config.hidden_size, config.intermediate_size
    return 8 * (5 * h * h + 3 * i * i + jobs * (8 * h * h + 4 * i * i))


def tuning_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of memory that tuning a layer takes: its payloads, a byte for each code, levels with their gradients and
    Adam's two moments, and the stream behind the layer.
    """
    weights = 3 * config.hidden_size * config.intermediate_size * config.num_local_experts
    return BASE_MEMORY + round(2.2 * weights) + 4 * tokens * config.hidden_size


def sensitivity_sizes(config: ModelConfig, tokens: int) -> tuple[int, int, int]:
    """Bytes that finding what errors behind each layer cost takes, beside a calibration on so many tokens: of memory at
    its peak, of disk meanwhile, and of what stays on the disk until the file is finished.

    The streams of all layers lie on the disk, to which two are on their way, and another one from there. Attention on
    the way back holds the scores of eight sequences five times.
    """
    h, layers = config.hidden_size, config.num_hidden_layers
    stream = 4 * h * min(tokens, SENSITIVITY_TOKENS)
    attention = 8 * 5 * 4 * config.num_attention_heads * SENSITIVITY_LENGTH**2
    stays = 4 * layers * (h * (h + 1) // 2)
    return BASE_MEMORY + 11 * stream + attention, stays + (layers + 2) * stream, stays


def inline_sizes(
    config: ModelConfig,
    tokens: int,
    build_bytes: int = 0,
    tuned: int = 0,
    ahead: int = 0,
    sensitive: bool = False,
) -> WorkSizes:
    """What a build that calibrates itself takes, where its encoding alone takes `build_bytes` of memory.

    What the experts of one layer see lies on the disk, with the residual streams before and after it, and those of each
    file whose layers are tuned besides, of which `tuned` is the number. On a GPU that runs some layers `ahead`, the
    moments of these and of the one that is encoded lie there, and the streams around them, but not what the experts
    see. A `sensitive` one finds first what errors behind each layer cost.
    """
    from ...formats.statistics.row_file import row_tensors

    sizes = calibration_sizes(config, tokens, "pooled")
    rows = sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in row_tensors(config, tokens).values())
    stream, layer = sizes.unfinished_bytes, sizes.layer_bytes
    disk = (1 + ahead) * (layer + stream) + stream if ahead else layer + rows + 2 * stream
    disk += 2 * stream * tuned
    memory = max(sizes.memory_bytes, build_bytes)
    if sensitive:
        before, meanwhile, stays = sensitivity_sizes(config, tokens)
        memory, disk = max(memory, before), max(meanwhile, disk + stays)
    return WorkSizes(tokens, memory, disk)
