"""Settings for all tests: hypothesis without deadlines, since the first call of a compiled loop compiles it."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("mq-quant", deadline=None, print_blob=True)
settings.load_profile("mq-quant")
