"""Kills builds that run the model on a text at random moments, continues them, and compares the bytes.

    python tests/quantize/pipeline/kill_passes.py --source FOLDER --kills 5

For each effort, `calibrated` and `tuned`, one build runs undisturbed. Another is killed (SIGKILL) again and again at
random moments and continued by the same command, until it has been killed so often, and then finished. Both files have
to be the same, and nothing may lie beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = Path(sys.executable).with_name("mq-quant")


def command(source: str, effort: str, sequences: int, output: Path) -> list[str]:
    options = ["--tier", "mq2", "--source", source, "--effort", effort, "--device", "cpu", "--quiet"]
    return [str(COMMAND), "build", *options, "--sequences", str(sequences), "-o", str(output)]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def killed_often(
    arguments: list[str], output: Path, kills: int, seconds: float, chance: random.Random
) -> list[str]:
    """Kill the build so often, at moments spread over its whole time; returns what lay beside the output each time."""
    seen: list[str] = []
    while len(seen) < kills:
        process = subprocess.Popen(arguments)
        try:
            process.wait(chance.uniform(0.15, 0.8) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            journal = output.with_name(f"{output.name}.partial.journal")
            done = len(journal.read_bytes().splitlines()) if journal.exists() else 0
            seen.append(f"{done} lines")
            continue
        if process.returncode != 0:
            raise SystemExit("a build failed on its own")
        output.unlink()  # it was finished before its kill: the next one begins anew
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        for effort in ("calibrated", "tuned"):
            whole, output = Path(name) / f"whole.{effort}", Path(name) / f"killed.{effort}"
            began = time.monotonic()
            subprocess.run(command(given.source, effort, given.sequences, whole), check=True)
            seconds = time.monotonic() - began
            arguments = command(given.source, effort, given.sequences, output)
            journals = killed_often(arguments, output, given.kills, seconds, chance)
            subprocess.run(arguments, check=True)
            left = sorted(p.name for p in Path(name).iterdir() if p not in (whole, output))
            same = sha256(whole) == sha256(output)
            print(
                f"{effort}: {given.kills} kills of {seconds:.0f} s, journals of {', '.join(journals)}: ",
                end="",
            )
            print("the same bytes" if same else "OTHER BYTES", *left, flush=True)
            if left or not same:
                raise SystemExit(1)
            whole.unlink()
            output.unlink()


if __name__ == "__main__":
    main()
