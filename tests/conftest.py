"""Settings for all tests: hypothesis without deadlines, since the first call of a compiled loop compiles it, and
threads that do not compete for cores.
"""

from __future__ import annotations

import os

# numpy and torch read these when they are loaded, here or in a process that a test starts. Builds give BLAS one thread
# too: on a busy machine, two that wait for each other take ten times as long. OpenMP spins unless it is told to sleep.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from hypothesis import settings
from mq_quant.formats.machine import cores

settings.register_profile("mq-quant", deadline=None, print_blob=True)
settings.load_profile("mq-quant")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many processes share the tests where `--numprocesses auto` is given: each takes up to 2 GB."""
    return min(cores(), 8)
