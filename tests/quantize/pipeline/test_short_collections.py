"""The garbage collector beside threads that keep a device busy."""

from __future__ import annotations

import gc

import pytest
from mq_quant.quantize.pipeline.short_collections import short_collections


def test_what_was_there_before_is_left_alone_until_the_end() -> None:
    with pytest.raises(RuntimeError, match="stopped"), short_collections():
        assert gc.get_freeze_count() > 1000
        raise RuntimeError("stopped")
    assert gc.get_freeze_count() == 0
