"""The HFQ container: reading and writing files, their layout in bytes, and what a file says of its making.

`layout` knows every offset before the first payload exists, `container` refuses what is not well formed, and
`provenance` reads the record of the build. All of this needs numpy and xxhash only. `stored`, which is imported by
itself, takes weights of the checkpoint to the stored basis and back.
"""

from .container import HfqFile, open_hfq, quantization_hash, write_hfq
from .layout import Layout, QuantizationHash, TensorEntry, TensorMeta, layout
from .provenance import Provenance

__all__ = [
    "HfqFile",
    "Layout",
    "Provenance",
    "QuantizationHash",
    "TensorEntry",
    "TensorMeta",
    "layout",
    "open_hfq",
    "quantization_hash",
    "write_hfq",
]
