"""What is fuzzed: for each kind of file a good one, the way it is changed, and what reads it."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import small_model
from fuzz_evaluation import (
    evaluation,
    llama_base,
    read_llama_base,
    read_result,
    read_saved_reference,
    saved_reference,
)
from measurement_document import document
from mq_quant.formats.checkpoint.local import open_checkpoint
from mq_quant.formats.hfq import Provenance, TensorMeta, layout, open_hfq, quantization_hash
from mq_quant.formats.minimax import inventory, parse_config
from mq_quant.formats.statistics.imatrix import (
    GGUF_NAMES,
    ImatrixEntry,
    check_imatrix,
    coverage,
    read_imatrix,
    write_imatrix,
)
from mq_quant.formats.tokenizer import TextTokenizer, chat_template
from mq_quant.quantize.calibrate.token_file import read_token_file
from mq_quant.quantize.fit.losses import measured
from mq_quant.quantize.fit.measurement import Measurement, read_measurement
from mq_quant.quantize.inspect.diff import diff_files
from mq_quant.quantize.inspect.show import inspect_file
from mq_quant.quantize.spec.metadata import SideFiles
from mq_quant.quantize.spec.places import side_files
from mq_quant.quantize.spec.recipe import bundled_path, load_recipe
from mq_quant.quantize.tiny.tokenizer import CHAT_TEMPLATE, tokenizer_json
from mq_quant.verify.stages.structure import check_structure
from mutations import either, mutate_bytes, mutate_json

GOLDEN = Path(__file__).parent / "golden" / "container.hfq"
MODEL = parse_config(small_model.CONFIG)
SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"

Mutate = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """A kind of file. `make` puts a good one with all it needs into an empty folder and returns its bytes; `read` does
    with the folder what commands do, and may raise errors of ours only.
    """

    file: str
    make: Callable[[Path], bytes]
    mutate: Mutate
    read: Callable[[Path], object]


# --- HFQ files --------------------------------------------------------------------------------------------------------


def _hfq_metadata() -> dict[str, object]:
    tokenizer = json.dumps(tokenizer_json(MODEL.vocab_size))
    return {
        "architecture": "minimax_m2",
        "config": small_model.CONFIG,
        "tokenizer": tokenizer,
        "tokenizer_config": {"chat_template": CHAT_TEMPLATE},
        "generation_config": {"eos_token_id": 1},
        "quantization_hash": {"value": "0" * 16, "tensor_count": 1},
        "parameter_counts": {"total_params": sum(int(np.prod(s.shape)) for s in inventory(MODEL))},
        "mq_quant": {
            "schema": 1,
            "recipe": {
                "tier": "mq4",
                "fit": "exact",
                "model": {"name": "m", "source": {"folder": "m"}},
                "awq": {},
            },
            "source": {"origin": {"folder": "m"}, "files": {"config.json": {"bytes": 1, "sha256": "0" * 64}}},
            "checksums": {"algorithm": "xxh64", "values": "0" * 16},
            "metadata_checksum": "0" * 16,
            "layers": [],
        },
    }


def _hfq_with(metadata: bytes) -> bytes:
    """A file of one tensor with these metadata, which need not be JSON."""
    row = TensorMeta("model.norm.weight", 2, (256,), 0, 1024)
    head = layout({}, [row]).header
    index = head[34 : 34 + 4 + 2 + len(row.name) + 2 + 4 + 12]
    used = 32 + len(metadata) + len(index)
    start = -(-used // 4096) * 4096
    packed = struct.pack("<4sIIIQQ", b"HFQM", 1, 10, 1, 32, start) + metadata + index
    return packed.ljust(start, b"\0") + np.ones(256, "<f4").tobytes()


def _hfq_metadata_bytes(folder: Path) -> bytes:
    return json.dumps(_hfq_metadata()).encode()


def _read_hfq(path: Path) -> None:
    with open_hfq(path) as file:
        quantization_hash(file)
        Provenance.of(file)
        check_structure(file)
    inspect_file(path)
    diff_files(GOLDEN, path).as_json()


def _read_hfq_metadata(folder: Path) -> None:
    path = folder / "x.hfq"
    path.write_bytes(_hfq_with((folder / "metadata.json").read_bytes()))
    _read_hfq(path)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _model(name: str) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        return (small_model.save(folder, small_model.tensors()) / name).read_bytes()

    return make


def _mutate_shard(rng: random.Random, seed: bytes) -> bytes:
    """A shard whose header is another JSON object of the right length."""
    end = 8 + int.from_bytes(seed[:8], "little")
    header = mutate_json(rng, seed[8:end])
    return struct.pack("<Q", len(header)) + header + seed[end:]


def _read_model(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.tensors:
        if len(name) % 7 == 0:
            checkpoint.weight(name)
    checkpoint.validate()


def _read_side_files(folder: Path) -> SideFiles:
    return side_files(lambda name: folder / name if (folder / name).is_file() else None)


def _tokenizer(folder: Path) -> bytes:
    return json.dumps(tokenizer_json(300), ensure_ascii=False).encode()


def _read_tokenizer(folder: Path) -> None:
    _read_side_files(folder)
    tokenizer = TextTokenizer.open(folder / "tokenizer.json")
    tokenizer.decode(tokenizer.ids("a text of words", special=True)[:8])


def _tokenizer_config(folder: Path) -> bytes:
    named = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool", "template": "x"}]
    return json.dumps({"eos_token": "<|end|>", "add_bos_token": False, "chat_template": named}).encode()


def _read_tokenizer_config(folder: Path) -> None:
    chat_template(_read_side_files(folder).tokenizer_config, folder)


# --- imatrices --------------------------------------------------------------------------------------------------------


def _statistics() -> dict[str, ImatrixEntry]:
    shape = (MODEL.num_local_experts, MODEL.hidden_size)
    mean = np.random.default_rng(0).random(shape, np.float32)
    names = (f"blk.{layer}.{name}.weight" for layer in range(2) for name in GGUF_NAMES.values())
    return {name: ImatrixEntry(mean, np.ones(shape[0])) for name in names}


def _gguf(folder: Path) -> bytes:
    write_imatrix(folder / "x.imatrix", _statistics(), ["text"], 1, 8)
    return (folder / "x.imatrix").read_bytes()


def _dat(folder: Path) -> bytes:
    out = struct.pack("<i", 6)
    for name, entry in _statistics().items():
        values = entry.sum2_mean.astype("<f4").tobytes()
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, len(values) // 4) + values
    return out + struct.pack("<ii", 3, 4) + b"text"


def _read_imatrix(folder: Path) -> None:
    imatrix = read_imatrix(folder / "x.imatrix")
    for entry in imatrix.entries.values():
        assert entry.sum2_mean.shape == (len(entry.counts), entry.sum2_mean.shape[1])
    check_imatrix(imatrix, MODEL)
    coverage(imatrix, MODEL)


# --- token ids and recipes --------------------------------------------------------------------------------------------


def _npy(folder: Path) -> bytes:
    np.save(folder / "tokens", np.arange(24, dtype=np.int32).reshape(4, 6))
    return (folder / "tokens.npy").read_bytes()


def _recipe(folder: Path) -> bytes:
    return bundled_path("mq2", "tiny").read_bytes()


_BYTES_OR_JSON = either(mutate_bytes, mutate_json)


def _measurement(folder: Path) -> bytes:
    return json.dumps(document()).encode()


def _read_measurement(folder: Path) -> None:
    found = read_measurement(folder / "m.json")
    assert Measurement.model_validate_json(found.text_json()) == found
    measured(found)


TARGETS: dict[str, Target] = {
    "hfq": Target(
        "x.hfq", lambda folder: GOLDEN.read_bytes(), mutate_bytes, lambda f: _read_hfq(f / "x.hfq")
    ),
    "hfq-metadata": Target("metadata.json", _hfq_metadata_bytes, _BYTES_OR_JSON, _read_hfq_metadata),
    "gguf": Target("x.imatrix", _gguf, mutate_bytes, _read_imatrix),
    "dat": Target("x.imatrix", _dat, mutate_bytes, _read_imatrix),
    "shard": Target(SHARD, _model(SHARD), either(mutate_bytes, _mutate_shard), _read_model),
    "index": Target(INDEX, _model(INDEX), _BYTES_OR_JSON, _read_model),
    "config": Target("config.json", _model("config.json"), _BYTES_OR_JSON, _read_model),
    "tokenizer": Target("tokenizer.json", _tokenizer, _BYTES_OR_JSON, _read_tokenizer),
    "tokenizer-config": Target(
        "tokenizer_config.json", _tokenizer_config, _BYTES_OR_JSON, _read_tokenizer_config
    ),
    "tokens": Target("tokens.npy", _npy, mutate_bytes, lambda f: read_token_file(f / "tokens.npy")),
    "tokens-as-text": Target(
        "tokens.txt",
        lambda folder: b"1 2 3\n4 5 6\n",
        mutate_bytes,
        lambda f: read_token_file(f / "tokens.txt"),
    ),
    "saved-reference": Target("x.reference", saved_reference, mutate_bytes, read_saved_reference),
    "llama-base": Target("x.base", llama_base, mutate_bytes, read_llama_base),
    "evaluation": Target("x.json", evaluation, _BYTES_OR_JSON, read_result),
    "measurement": Target("m.json", _measurement, _BYTES_OR_JSON, _read_measurement),
    "recipe": Target("x.yaml", _recipe, mutate_bytes, lambda f: load_recipe(f / "x.yaml")),
}


def input_of(name: str, number: int, seed: bytes) -> bytes:
    """Input `number` of a target, from its good file: the same bytes on every machine."""
    return TARGETS[name].mutate(random.Random(f"{name} {number}"), seed)
