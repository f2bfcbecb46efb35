#!/usr/bin/env python3
"""Holds what an engine computed of a conformance kit against what is right, and names the fault where they differ.

    python3 check_kit.py RESULTS            # RESULTS: a folder with what the engine wrote, named as README.md says
    python3 check_kit.py RESULTS --kit DIR  # where this file does not lie in the kit

The standard library is all that it needs (Python 3.10 or newer). The exit code is 0 where everything that is there is
right, 1 where something departs, and 2 where nothing can be judged.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER = struct.Struct("<8sIIII")
MAGICS = (b"HFHS\0\0\0\0", b"HFHIDDEN")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
GROUP = 256
NEAR = 0.5
"""A dump has a known fault where it is at most this share as far from what the fault gives as from what is right."""
SUM_ERROR = 2e-3
"""Error of a product that is let through, as a share of what its groups of columns add up to without their signs."""

Rows = list["array[float]"]


class KitError(Exception):
    """A kit or a result that cannot be read."""


@dataclass(frozen=True)
class Finding:
    """One result that departs: where, how far, and the ids of the faults that would give it, if any known one does."""

    where: str
    problem: str
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """What was judged, what was not there, and what departs."""

    judged: tuple[str, ...]
    missing: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def named(self) -> tuple[str, ...]:
        """The faults that explain every hidden state that departs; where none does, all that explain one."""
        sets = [set(f.faults) for f in self.findings if f.faults]
        common = set.intersection(*sets) if sets else set()
        return tuple(sorted(common or set().union(*sets)))


# --- reading --------------------------------------------------------------------------------------------------------


def read_floats(path: Path, count: int | None = None, offset: int = 0) -> array[float]:
    """Little-endian f32 values of a file: `count` of them from byte `offset` on, or all; KitError."""
    try:
        with path.open("rb") as f:
            f.seek(offset)
            raw = f.read() if count is None else f.read(4 * count)
    except OSError as e:
        raise KitError(f"{path}: cannot be read: {e.strerror}") from None
    if len(raw) % 4 or (count is not None and len(raw) != 4 * count):
        raise KitError(f"{path}: has {len(raw)} bytes from byte {offset} on, not {4 * (count or 0)}")
    values = array("f")
    values.frombytes(raw)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def read_hidden(path: Path) -> list[Rows]:
    """A dump of hidden states (HFHS): for each layer the rows of its positions; KitError for anything else."""
    try:
        with path.open("rb") as f:
            head = f.read(HEADER.size)
    except OSError as e:
        raise KitError(f"{path}: cannot be read: {e.strerror}") from None
    if len(head) < HEADER.size or head[:8] not in MAGICS:
        raise KitError(f"{path}: is not a dump of hidden states: it does not begin with HFHS")
    _, layers, positions, hidden, _ = HEADER.unpack(head)
    expected = HEADER.size + 4 * layers * positions * hidden
    if not expected > HEADER.size or path.stat().st_size != expected:
        raise KitError(f"{path}: has not the {expected} bytes of {layers} layers of {positions} x {hidden}")
    values = read_floats(path, offset=HEADER.size)
    size = positions * hidden
    return [rows(values[i * size : (i + 1) * size], hidden) for i in range(layers)]


def rows(values: array[float], width: int) -> Rows:
    return [values[i : i + width] for i in range(0, len(values), width)]


def read_manifest(kit: Path) -> dict[str, Any]:
    """kit.json; KitError where there is none, or it is another program's."""
    try:
        manifest = json.loads((kit / "kit.json").read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise KitError(f"{kit / 'kit.json'}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != 1:
        raise KitError(f"{kit / 'kit.json'}: is not the manifest of a kit that this program reads")
    models = manifest.get("models")
    if not isinstance(models, list) or not all(isinstance(m, dict) and m.get("prompts") for m in models):
        raise KitError(f"{kit / 'kit.json'}: does not list models with prompts")
    for name in [each.get("name") for model in models for each in (model, *model["prompts"])]:
        if not NAME.fullmatch(str(name)):
            raise KitError(f"{kit / 'kit.json'}: {name!r} is no name of a model or prompt")
    return manifest


# --- judging --------------------------------------------------------------------------------------------------------


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """1 where both are zero; NaN where a value is no number."""
    x, y, both = (math.fsum(p * q for p, q in zip(u, v)) for u, v in ((a, a), (b, b), (a, b)))  # noqa: B905
    return both / math.sqrt(x * y) if x and y else float(x == y)


def distance(a: Rows, b: Rows) -> float:
    """The square root of the summed squares of the differences."""
    return math.sqrt(math.fsum((p - q) ** 2 for u, v in zip(a, b) for p, q in zip(u, v)))  # noqa: B905


def judge_hidden(kit: Path, model: dict[str, Any], prompt: dict[str, Any], dump: Path) -> Finding | None:
    """Hold a dump of one model and prompt against what is right; None where every layer is."""
    folder, where = kit / model["name"], f"{model['name']}, prompt {prompt['name']}"
    expected, got = read_hidden(folder / prompt["expected"]), read_hidden(dump)
    shapes = [(len(d), len(d[0]), len(d[0][0])) for d in (got, expected)]
    if shapes[0] != shapes[1]:
        raise KitError(f"{dump}: holds {shapes[0]} (layers, positions, hidden), and {where} has {shapes[1]}")
    for layer, (mine, right) in enumerate(zip(got, expected)):  # noqa: B905
        worst = min((cosine(a, b) for a, b in zip(mine, right)), key=lambda c: (c == c, c))  # noqa: B905
        if not worst >= model["bar"]:
            names, said = suspects(folder, prompt, mine, right) if layer == 0 else ((), later(model, layer))
            return Finding(where, f"layer {layer} departs (cosine {worst:.5f}){said}", names)
    return None


def later(model: dict[str, Any], layer: int) -> str:
    """Words on a layer that departs where those before it are right."""
    gate_up, down = model["formats"][layer]
    return f", and those before it are right: its gate and up are in {gate_up} and its down in {down}, unlike theirs"


def suspects(folder: Path, prompt: dict[str, Any], mine: Rows, right: Rows) -> tuple[tuple[str, ...], str]:
    """The faults whose hidden states a dump has, and words on them."""
    last = prompt["suspect_positions"]
    apart = distance(mine[-last:], right[-last:])
    if not math.isfinite(apart):
        return (), ": it holds values that are no numbers"
    best: tuple[float, dict[str, Any]] | None = None
    for suspect in prompt["suspects"]:
        states = rows(read_floats(folder / suspect["states"]), len(mine[0]))
        found = distance(mine[-last:], states)
        if found <= NEAR * apart and (best is None or found < best[0]):
            best = found, suspect
    if best is None:
        return (), ", as no known fault does; the products (vectors) narrow it down"
    said = " or ".join(f"{f['projection']}: {f['sentence']}" for f in best[1]["faults"])
    return tuple(f["id"] for f in best[1]["faults"]), f": {said}"


def judge_logits(kit: Path, model: dict[str, Any], prompt: dict[str, Any], path: Path) -> Finding | None:
    """Hold next-token logits f32 [positions, vocabulary] against what is right."""
    right = read_floats(kit / model["name"] / prompt["logits"])
    got, width = read_floats(path, len(right)), len(right) // len(prompt["tokens"])
    worst = min(cosine(a, b) for a, b in zip(rows(got, width), rows(right, width)))  # noqa: B905
    if worst >= model["bar"]:
        return None
    where = f"{model['name']}, prompt {prompt['name']}"
    return Finding(
        where,
        f"logits depart (cosine {worst:.5f}); where the hidden states are right it is lm_head or the last norm",
    )


def judge_vectors(kit: Path, manifest: dict[str, Any], kernel: str, path: Path) -> Iterator[Finding]:
    """Hold the products of one kernel against what is right, and say which columns are left out."""
    described = manifest["vectors"]
    formats = described["kernels"][kernel]
    chosen = [v for v in described["list"] if v["format"] in formats]
    count = described["rows"]
    results = read_floats(path, count * len(chosen))
    for i, vector in enumerate(chosen):
        groups = vector["columns"] // GROUP
        parts = rows(read_floats(kit / described["file"], count * groups, vector["parts"]), groups)
        got = results[i * count : (i + 1) * count]
        if all_near(got, parts, (1 << groups) - 1):
            continue
        where = f"{kernel} in {vector['format']}, {vector['columns']} columns"
        kept = next((s for s in range(1 << groups) if all_near(got, parts, s)), None)
        said = "the result is wrong in another way" if kept is None else left_out(kept, groups)
        yield Finding(where, said)


def all_near(got: Sequence[float], parts: Rows, kept: int) -> bool:
    """Whether every row's result is the sum of the groups in the bit set `kept`."""
    for value, row in zip(got, parts):  # noqa: B905
        total = sum(part for g, part in enumerate(row) if kept >> g & 1)
        if not abs(value - total) <= SUM_ERROR * sum(map(abs, row)):
            return False
    return True


def left_out(kept: int, groups: int) -> str:
    """Which columns are left out, in runs."""
    runs: list[list[int]] = []
    for g in range(groups):
        if not kept >> g & 1:
            if runs and runs[-1][1] == g * GROUP:
                runs[-1][1] += GROUP
            else:
                runs.append([g * GROUP, (g + 1) * GROUP])
    said = ", ".join(f"{low} to {high - 1}" for low, high in runs)
    return f"columns {said} are left out of the sum"


def judge(kit: Path, results: Path) -> Judgement:
    """Judge every result of a folder that the kit has an expectation for; KitError where one cannot be read."""
    manifest = read_manifest(kit)
    try:
        return _judge(kit, manifest, results)
    except (LookupError, TypeError, AttributeError) as e:
        raise KitError(f"{kit / 'kit.json'}: does not describe a kit ({type(e).__name__}: {e})") from None


def _judge(kit: Path, manifest: dict[str, Any], results: Path) -> Judgement:
    judged, missing, findings = [], [], []

    def take(path: Path, found: list[Finding]) -> None:
        judged.append(path.name)
        findings.extend(found)

    for kernel in manifest["vectors"]["kernels"]:
        path = results / f"vectors.{kernel}.f32"
        if path.is_file():
            take(path, list(judge_vectors(kit, manifest, kernel, path)))
        else:
            missing.append(path.name)
    for model in manifest["models"]:
        for prompt in model["prompts"]:
            for kind, judged_by in (("hfhs", judge_hidden), ("logits.f32", judge_logits)):
                path = results / f"{model['name']}.{prompt['name']}.{kind}"
                if path.is_file():
                    finding = judged_by(kit, model, prompt, path)
                    take(path, [finding] if finding else [])
                else:
                    missing.append(path.name)
    return Judgement(tuple(judged), tuple(missing), tuple(findings))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Hold an engine's results against a conformance kit.")
    parser.add_argument("results", type=Path, help="the folder with what the engine wrote")
    parser.add_argument("--kit", type=Path, default=Path(__file__).parent, help="default: this file's folder")
    args = parser.parse_args(argv)
    try:
        found = judge(args.kit, args.results)
        if not found.judged:
            raise KitError(f"{args.results}: holds no result of this kit, such as {found.missing[0]}")
    except KitError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    for finding in found.findings:
        print(f"{finding.where}: {finding.problem}")
    if found.missing:
        print(f"not judged, since it is not there: {', '.join(found.missing)}")
    wrong = len(found.findings)
    print(f"{len(found.judged)} results judged: " + (f"{wrong} departures" if wrong else "all are right"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
