"""Whether 2-bit experts collapse into repetition: continuations by a real model with its MLPs at few bits.

    pip install 'mq-quant[bench]'
    python benchmarks/loops.py -o out/loops

SmolLM2-135M as in quality_real.py: its MLPs are encoded by each fit, and 32 prompts of 32 held-out tokens are continued
by 128, greedily and at temperature 0.8 with one seed. "In a loop" counts continuations that end in a block of at most
32 ids said three times; "distinct" is the share of different 4-grams; the perplexity is the source model's, of the
sampled text. A small model repeats itself even unquantised, so every row stands beside the source's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_real import FITS, Bench, corpus, load

PROMPTS, PROMPT, LENGTH, LONGEST_PERIOD, REPEATS = 32, 32, 128, 32, 3


def in_loop(ids: list[int]) -> bool:
    """Whether the ids end in one block of at most LONGEST_PERIOD ids, said REPEATS times."""
    for period in range(1, LONGEST_PERIOD + 1):
        tail = ids[-period * REPEATS :]
        if len(tail) == period * REPEATS and tail == tail[:period] * REPEATS:
            return True
    return False


def distinct(ids: list[int], n: int = 4) -> float:
    """Share of different n-grams among all."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams)


def continued(model: Any, prompts: torch.Tensor, sample: bool) -> torch.Tensor:
    """Continuations i64 [prompts, LENGTH] of prompts i64 [prompts, PROMPT]; an end of text does not end them."""
    torch.manual_seed(0)
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 0} if sample else {"do_sample": False}
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        pad_token_id=0,
        **settings,
    )
    return torch.as_tensor(out[:, prompts.shape[1] :])


def perplexity(source: Any, prompts: torch.Tensor, text: torch.Tensor) -> float:
    """The source's perplexity of the continuations, all tokens together."""
    logits = source(torch.cat([prompts, text], 1)).logits[:, prompts.shape[1] - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.flatten()).exp())


def figures(model: Any, source: Any, prompts: torch.Tensor) -> dict[str, Any]:
    greedy, sampled = (continued(model, prompts, sample) for sample in (False, True))
    return {
        "greedy_loops": float(np.mean([in_loop(ids) for ids in greedy.tolist()])),
        "greedy_distinct": float(np.mean([distinct(ids) for ids in greedy.tolist()])),
        "sampled_loops": float(np.mean([in_loop(ids) for ids in sampled.tolist()])),
        "sampled_distinct": float(np.mean([distinct(ids) for ids in sampled.tolist()])),
        "perplexity": perplexity(source, prompts, sampled),
        "sampled": sampled[:4].tolist(),
    }


def line(name: str, row: dict[str, Any]) -> str:
    return (
        f"| {name} | {row['greedy_loops']:.0%} | {row['greedy_distinct']:.2f} | {row['sampled_loops']:.0%} "
        f"| {row['sampled_distinct']:.2f} | {row['perplexity']:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Repetition in a real model's continuations, by fit.")
    parser.add_argument("--pair", default="MQ2·MQ2", help="formats of gate and up · down")
    parser.add_argument(
        "--fits", nargs="+", default=["reference", "hessian", "calibrated"], choices=list(FITS)
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("out/loops"))
    args = parser.parse_args()

    torch.set_grad_enabled(False)
    bench = Bench(None, corpus()[1])
    source, tokenizer = load(None)
    starts = torch.from_numpy(bench.tokens.reshape(-1, 128)[:PROMPTS, :PROMPT])
    print("| MLPs | greedy: in a loop | distinct | sampled: in a loop | distinct | perplexity |")
    print("|---|---|---|---|---|---|")
    rows = {"source": figures(source, source, starts)}
    print(line("source", rows["source"]), flush=True)
    for fit in args.fits:
        encoded = bench.encode(fit, [args.pair])
        bench.use(args.pair, encoded)
        name = f"{args.pair} {fit}"
        rows[name] = figures(bench.model, source, starts)
        print(line(name, rows[name]), flush=True)
    for row in rows.values():
        row["sampled"] = [tokenizer.decode(ids) for ids in row["sampled"]]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "loops.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
