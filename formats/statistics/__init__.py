"""What is known of a model's activations, as files: imatrix files of llama.cpp, and folders of second moments.

Readers check headers and sizes before they take memory, map no file, and refuse one that changes while it is in use.
What statistics mean for rounding is the room `awq`'s part.
"""

from .imatrix import (
    GGUF_NAMES,
    Imatrix,
    ImatrixEntry,
    check_imatrix,
    coverage,
    expert_entry,
    read_imatrix,
    write_imatrix,
)
from .moment_file import DOWN_FORMS, DownForm, LayerFile, open_layer_file
from .moment_folder import Calibration, Manifest, open_calibration

__all__ = [
    "DOWN_FORMS",
    "GGUF_NAMES",
    "Calibration",
    "DownForm",
    "Imatrix",
    "ImatrixEntry",
    "LayerFile",
    "Manifest",
    "check_imatrix",
    "coverage",
    "expert_entry",
    "open_calibration",
    "open_layer_file",
    "read_imatrix",
    "write_imatrix",
]
