"""mq-quant: turns the FP8 checkpoint of MiniMax-M2.7 into files for the hipfire engine, and judges the result.

    import mq_quant as mq

    recipe = mq.load_recipe("mq2", source="tiny")
    print(mq.plan_file(recipe).total_bytes)
    made = mq.build_file(recipe, "tiny.mq2", jobs=4, on_done=lambda unit: print(unit.key))
    with mq.open_hfq(made.path) as file:
        print(len(file.entries), file.metadata["quantization_hash"]["value"])
    mq.verify_file(made.path, source="tiny").raise_if_failed()

Importing loads nothing: each name brings what it needs on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .formats.errors import MqError as MqError
    from .formats.hfq import open_hfq as open_hfq
    from .quantize.api import build_file as build_file
    from .quantize.api import build_files as build_files
    from .quantize.api import calibrate as calibrate
    from .quantize.api import evaluate_files as evaluate_files
    from .quantize.api import load_recipe as load_recipe
    from .quantize.api import open_source as open_source
    from .quantize.api import plan_file as plan_file
    from .quantize.api import reproduce_file as reproduce_file
    from .quantize.api import tiers as tiers
    from .quantize.api import verify_file as verify_file
    from .quantize.api_fit import build_fitted as build_fitted
    from .quantize.api_fit import fit_recipe as fit_recipe
    from .quantize.api_fit import measure_model as measure_model
    from .quantize.inspect.diff import diff_files as diff_files

    __version__: str

_API = (
    "build_file", "build_files", "calibrate", "evaluate_files", "load_recipe", "open_source", "plan_file",
    "reproduce_file", "tiers", "verify_file",
)  # fmt: skip
_FIT = ("build_fitted", "fit_recipe", "measure_model")
_PLACES = {
    **dict.fromkeys(_API, ".quantize.api"),
    **dict.fromkeys(_FIT, ".quantize.api_fit"),
    "diff_files": ".quantize.inspect.diff",
    "open_hfq": ".formats.hfq",
    "MqError": ".formats.errors",
}
__all__ = [
    "MqError", "__version__", "build_file", "build_files", "build_fitted", "calibrate", "diff_files", "evaluate_files",
    "fit_recipe", "load_recipe", "measure_model", "open_hfq", "open_source", "plan_file", "reproduce_file", "tiers",
    "verify_file",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load a public name on its first use."""
    if name == "__version__":
        from importlib.metadata import version

        return version("mq-quant")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_PLACES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted(__all__)
