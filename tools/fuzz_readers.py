"""A fuzz campaign over everything that reads files: `python tools/fuzz_readers.py --inputs 100000`.

Each kind of file is read in a process of its own, so that an end by a signal is found too. A finding is anything but a
result or an error of ours: another exception, a warning, more memory than `MEMORY`, more than `SECONDS` of processor
time. The input of a finding is kept in the folder of `--keep`, and `--only KIND --first N --inputs 1` reads it again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEMORY = 2 << 30
SECONDS = 10.0
FINDINGS = 10
"""Findings after which a kind of file is left."""


def attack(name: str, first: int, count: int, progress: Path) -> int:
    """Read inputs first to first + count of one kind; prints a JSON line for each finding, and one with the sums."""
    from fuzz_targets import TARGETS, input_of
    from mq_quant.formats.errors import MqError

    target = TARGETS[name]
    taken = refused = findings = 0
    with tempfile.TemporaryDirectory() as folder:
        seed = target.make(Path(folder))
        (Path(folder) / target.file).write_bytes(seed)
        target.read(Path(folder))
        limit_memory()
        warnings.simplefilter("error")
        for number in range(first, first + count):
            progress.write_text(str(number))
            (Path(folder) / target.file).write_bytes(input_of(name, number, seed))
            began, fault = time.process_time(), None
            try:
                target.read(Path(folder))
                taken += 1
            except MqError as e:
                refused += 1
                if not str(e).replace("\n", "").isprintable():
                    fault = f"a message that is not printable: {str(e)!r}"
            except BaseException as e:
                if isinstance(e, KeyboardInterrupt):
                    raise
                fault = "".join(traceback.format_exception(e)[-3:]).strip()
            if fault is None and (took := time.process_time() - began) > SECONDS:
                fault = f"took {took:.0f} seconds"
            if fault is not None:
                findings += 1
                print(json.dumps({"input": number, "fault": fault}), flush=True)
                if findings == FINDINGS:
                    break
    print(json.dumps({"taken": taken, "refused": refused}), flush=True)
    return 0


def limit_memory() -> None:
    """From here on, no more than MEMORY beside what is in use."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))


def campaign(names: list[str], first: int, inputs: int, keep: Path) -> int:
    """Share the inputs between the kinds and read them; returns the number of findings."""
    each, found = max(1, -(-inputs // len(names))), 0
    for name in names:
        began = time.monotonic()
        at, taken, refused = first, 0, 0
        while at < first + each:
            lines, ended = _child(name, at, first + each - at)
            sums = next((line for line in lines if "taken" in line), None)
            for line in (line for line in lines if "fault" in line):
                found += 1
                _report(name, line["input"], line["fault"], keep)
            if sums is not None:
                taken, refused = taken + sums["taken"], refused + sums["refused"]
                break
            found += 1
            _report(name, ended, "ended the process that read it", keep)
            at = ended + 1
        print(
            f"{name:18}{each} inputs, {taken} taken, {refused} refused, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    print(f"{each * len(names)} inputs, {found} findings")
    return found


def _child(name: str, first: int, count: int) -> tuple[list[dict[str, object]], int]:
    """The lines that a process printed, and the input that it was at."""
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "at"
        command = [sys.executable, __file__, "--child", name, "--first", str(first), "--inputs", str(count)]
        done = subprocess.run(
            [*command, "--progress", str(progress)], stdout=subprocess.PIPE, text=True, check=False
        )
        at = int(progress.read_text()) if progress.exists() else first
        return [json.loads(line) for line in done.stdout.splitlines()], at


def _report(name: str, number: object, fault: object, keep: Path) -> None:
    from fuzz_targets import TARGETS, input_of

    print(f"FINDING {name} {number}: {fault}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        seed = TARGETS[name].make(Path(folder))
    keep.mkdir(parents=True, exist_ok=True)
    (keep / f"{name}-{number}").write_bytes(input_of(name, int(str(number)), seed))


def main(arguments: list[str] | None = None) -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    from fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs in all; default 100000")
    parser.add_argument(
        "--first", type=int, default=0, help="the number of each kind's first input; default 0"
    )
    parser.add_argument("--only", choices=list(TARGETS), action="append", help="this kind of file only")
    parser.add_argument(
        "--keep", type=Path, default=Path("out/fuzz"), help="where findings go; default out/fuzz"
    )
    parser.add_argument("--child", choices=list(TARGETS), help=argparse.SUPPRESS)
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        return attack(given.child, given.first, given.inputs, given.progress)
    return 1 if campaign(given.only or list(TARGETS), given.first, given.inputs, given.keep) else 0


if __name__ == "__main__":
    sys.exit(main())
