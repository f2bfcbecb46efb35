"""Kills a build at random moments, resumes it, and compares the result with an uninterrupted build, byte for byte.

One command: `python tests/quantize/kill_harness.py --kills 50` (or `make kills`); a short version of it is a test.
Builds run in forked children, so that each starts with everything imported and compiled. Children report every unit
that they begin, so that what a kill costs is counted and not guessed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parents[2]))

import small_model
from mq_quant.quantize.cli.app import main as command
from mq_quant.quantize.cli.start import INTERRUPTED
from mq_quant.quantize.pipeline import build as pipeline
from mq_quant.quantize.pipeline.build import RunOptions, build_file
from mq_quant.quantize.pipeline.statistics import NoStatistics
from mq_quant.quantize.pipeline.work_units import WorkUnit
from mq_quant.quantize.pipeline.worker_pool import AHEAD
from mq_quant.quantize.spec.places import choose_recipe
from mq_quant.quantize.write.journal import read_journal
from mq_quant.quantize.write.partial_file import JOURNAL

JOBS = 3
IN_FLIGHT = AHEAD * JOBS + 1


def run(source: Path, output: Path, **hooks: Any) -> None:
    recipe = choose_recipe("mq2", None, str(source))
    build_file(recipe, NoStatistics(), RunOptions(output, JOBS, **hooks))


def reporter(report: int) -> Callable[[WorkUnit], None]:
    """A hook that writes one byte to `report` for each unit that is begun."""
    return lambda unit: os.write(report, b"u") and None


def child(source: Path, output: Path, report: int) -> NoReturn:
    """Build in this process, counting units."""
    code = 1
    try:
        run(source, output, on_begin=reporter(report))
        code = 0
    finally:
        os._exit(code)


def kill_after(source: Path, output: Path, seconds: float) -> tuple[bool, int]:
    """Start the build and kill it after some time; returns whether it was killed, and how many units it began."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        child(source, output, writing)
    os.close(writing)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reading, "rb") as pipe:
        encoded = len(pipe.read())
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit("a build failed on its own")
    return os.WIFSIGNALED(status), encoded


def interrupt(source: Path, output: Path) -> int:
    """Start `mq-quant build`, send it SIGINT once its first unit is begun, and return its exit code."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        arguments = f"build --tier mq2 --no-imatrix -q --jobs {JOBS} --source".split()
        code = 0
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # The command line gives no hook of its own: this process gets options that have one.
            pipeline.RunOptions = partial(RunOptions, on_begin=reporter(writing))
            command([*arguments, str(source), "-o", str(output)])
        except SystemExit as e:
            code = int(e.code or 0)
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        pipe.read(1)
        os.kill(pid, signal.SIGINT)
        pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def journalled(output: Path) -> int:
    journal = output.with_name(output.name + JOURNAL)
    return max(0, len(read_journal(journal)[0]) - 1) if journal.exists() else 0


def harness(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill `kills` builds, each until it is whole at last; returns the counts."""
    chance = random.Random(seed)
    config = {**small_model.CONFIG, "num_local_experts": 6}
    source = small_model.save(folder / "source", small_model.tensors(config=config), config=config)
    whole = folder / "whole"
    run(source, whole)
    began = time.monotonic()
    run(source, folder / "again")
    duration = time.monotonic() - began
    done = same = early = files = 0
    worst = lost = 0
    while done < kills:
        output = folder / "out"
        output.unlink(missing_ok=True)
        while not output.exists():
            before = journalled(output)
            killed, encoded = kill_after(source, output, chance.uniform(0, 1.1 * duration))
            if not killed:
                continue
            done += 1
            if output.exists():
                early += 1  # killed between the rename and the end of the process
                continue
            lost_now = encoded - (journalled(output) - before)
            worst, lost = max(worst, lost_now), lost + lost_now
            if done >= kills:
                run(source, output)
        files += 1
        same += output.read_bytes() == whole.read_bytes()
        leftovers = sorted(path.name for path in folder.glob("out?*"))
        if leftovers and not early:
            raise SystemExit(f"left behind: {leftovers}")
        for path in folder.glob("out?*"):
            path.unlink()
    output = folder / "interrupted"
    code = interrupt(source, output)
    clean = code in (0, INTERRUPTED) and (code == 0) == output.exists()
    if not output.exists():
        run(source, output)
    return {
        "kills": done,
        "files": files,
        "identical": same,
        "units_lost_most": worst,
        "units_lost_mean": round(lost / done, 2),
        "units_in_flight": IN_FLIGHT,
        "interrupt_exit_code": code,
        "interrupt_clean": clean and output.read_bytes() == whole.read_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = harness(given.kills, given.seed, Path(folder))
    print(json.dumps(result))
    good = result["identical"] == result["files"] and result["units_lost_most"] <= IN_FLIGHT
    sys.exit(0 if good and result["interrupt_clean"] else 1)


if __name__ == "__main__":
    main()
