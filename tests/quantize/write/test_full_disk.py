"""A real small file system: a build that does not fit says so, before work where it can know, and leaves nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNSHARE = ["unshare", "--mount", "--map-root-user"]


def _can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    probe = [*UNSHARE, "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not _can_mount(), reason="no mount namespaces here")


def build_on(disk: Path, size: str, filled: int, small: Path) -> subprocess.CompletedProcess[str]:
    """Build on a tmpfs of some size, of which another file takes `filled` bytes while the build runs."""
    script = f"""
import os, sys
from pathlib import Path
from mq_quant.quantize.cli.app import main
disk = Path({str(disk)!r})
fallocate = os.posix_fallocate
def late(fd, offset, size):
    (disk / "other").write_bytes(b"x" * {filled})
    fallocate(fd, offset, size)
os.posix_fallocate = late
try:
    main(["build", "--tier", "mq2", "--source", {str(small)!r}, "--no-imatrix", "-q", "-o", str(disk / "out")])
except SystemExit as e:
    print("code", e.code, sorted(p.name for p in disk.iterdir()))
"""
    mounted = f'mount -t tmpfs -o size={size} none {disk} && exec {sys.executable} -c "$SCRIPT"'
    return subprocess.run(
        [*UNSHARE, "sh", "-c", mounted], env={"SCRIPT": script, "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_disk_that_is_too_small_is_refused_before_work(tmp_path: Path, small: Path) -> None:
    done = build_on(tmp_path, "400k", 0, small)
    assert "its disk has 0.0 GB free" in done.stderr
    assert done.stdout.strip() == "code 2 []"


def test_a_disk_that_fills_up_meanwhile_is_a_clear_error(tmp_path: Path, small: Path) -> None:
    done = build_on(tmp_path, "2m", 1_500_000, small)
    assert "the disk is full" in done.stderr
    assert done.stdout.strip() == "code 2 ['other']"
