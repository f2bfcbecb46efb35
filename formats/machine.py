"""The machine that this process runs on: its cores, its memory, and every environment variable that mq-quant reads."""

from __future__ import annotations

import math
import os
import resource
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from .errors import BackendError

VARIABLES: Mapping[str, str] = {
    "XDG_CACHE_HOME": "the folder of caches; compiled code and the tiny checkpoint lie in its folder mq-quant",
    "NUMBA_CACHE_DIR": "where numba keeps compiled code; the compiled loops of mq-quant lie in its folder mq-quant",
    "TMPDIR": "the folder of temporary files; takes compiled code where no cache can be written",
    "CXX": "the C++ compiler of kernels for the CPU, with its flags, quoted as for a shell",
    "ROCM_PATH": "the folder of ROCm, whose bin holds hipcc",
    "HF_ENDPOINT": "the address of the hub or of a mirror",
    "CUDA_VISIBLE_DEVICES": "the GPUs that CUDA shows this process; read to find the one that Ray has given to a task",
    "HIP_VISIBLE_DEVICES": "the same of HIP",
    "HF_HUB_OFFLINE": "1, true, yes or on: the hub is not asked, what is in its cache is used",
}
"""The environment variables that mq-quant reads itself. Others are read by huggingface_hub (HF_TOKEN, HF_HOME), torch
and the HTTP client (proxies); numba's others are left out."""


def variable(name: str) -> str | None:
    """The value of one of VARIABLES; None where it is not set, or blank."""
    if name not in VARIABLES:
        raise KeyError(name)
    value = os.environ.get(name, "")
    return value if value.strip() else None


def offer(name: str, value: str) -> None:
    """Set an environment variable that a library reads when it starts to work, unless the person has set it."""
    os.environ.setdefault(name, value)


_OF_TORCH = ("PYTORCH_JIT", "TORCH_DISTRIBUTED_DEBUG", "TORCH_LOGS")
"""What torch reads for those who look for faults in it."""


def leave_out_foreign_settings() -> None:
    """Leave out what the shell sets for other programs, and what would change or end this one.

    numba reads settings that switch compiling off or let compiled loops round in another way, and ends where one of
    them is no number. torch cannot be loaded where one of _OF_TORCH is not as it knows it. numpy ends where
    SOURCE_DATE_EPOCH is no number.
    """
    of_numba = [name for name in os.environ if name.startswith("NUMBA_") and name not in VARIABLES]
    for name in (*of_numba, *(name for name in _OF_TORCH if name in os.environ)):
        del os.environ[name]
    if not os.environ.get("SOURCE_DATE_EPOCH", "0").isdigit():
        del os.environ["SOURCE_DATE_EPOCH"]


def words(name: str) -> tuple[str, ...]:
    """A variable's value as a shell would split it; one word where it is the name of a file, spaces and all.

    No words where it is not set. Raises BackendError where a quote is not closed.
    """
    value = variable(name)
    if value is None:
        return ()
    if Path(value).exists():
        return (value,)
    try:
        return tuple(shlex.split(value))
    except ValueError as e:
        raise BackendError(
            f"{name} cannot be split into words: {e}",
            hint=f"{name} is {value!r}; quote it as for a shell",
        ) from None


def home() -> Path | None:
    """The user's home folder; None where neither HOME nor the password file names one."""
    try:
        path = Path.home()
    except RuntimeError:
        return None
    return path if path.is_absolute() else None


def cores() -> int:
    """How many cores this process may use: those it may run on, but no more than its control groups allow."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, quota())))


def quota(root: Path = Path("/")) -> float:
    """Cores that the control groups of this process and those above them allow in the mean; infinite without a limit.

    `root` is the folder that holds `proc` and the control groups, of version 1 and 2.
    """
    least = math.inf
    for folder in _groups(root):
        least = min(least, _limit(folder))
    return least


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's control groups and of those above them, as far as they are mounted here."""
    of: dict[str, Path] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        of |= {name: Path(path) for name in controllers.split(",")}
    for line in _lines(root / "proc/self/mountinfo"):
        about, _, system = line.partition(" - ")
        kind, _, options = [*system.split(), "", "", ""][:3]
        controller = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
        if controller not in of or (controller and controller not in options.split(",")):
            continue
        begin, mount = (field.replace("\\040", " ") for field in [*about.split(), *"/////"][3:5])
        top, group = root / mount.lstrip("/"), of[controller]
        yield top
        if group.is_relative_to(begin):
            for part in group.relative_to(begin).parts:
                top = top / part
                yield top


def _limit(folder: Path) -> float:
    """Cores that one control group allows; infinite where it says nothing."""
    v2 = _lines(folder / "cpu.max")
    texts = v2[0].split() if v2 else []
    if not texts:
        texts = [*_lines(folder / "cpu.cfs_quota_us")[:1], *_lines(folder / "cpu.cfs_period_us")[:1]]
    try:
        allowed, period = (int(text) for text in texts)
    except ValueError:  # "max", or nothing
        return math.inf
    return allowed / period if allowed > 0 and period > 0 else math.inf


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def memory() -> int:
    """The memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_rss() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
