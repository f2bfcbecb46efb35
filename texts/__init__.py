"""The texts that travel with the package: one to calibrate on, and one of other documents to judge by.

Both hold English prose, code in ten languages, mathematics, JSON, conversations with tool calls in MiniMax-M2's chat
format, Chinese and seven other languages, mixed so that every prefix holds each kind by its share. SOURCES.md names
where every document comes from and under which licence; `tools/make_texts.py` makes the texts anew.
"""

from __future__ import annotations

import hashlib
import lzma
from importlib.resources import files

CALIBRATION_SHA256 = "4839cfdd8422b625fb91833cd0dc756471ff7a11b08a825685f6160439307dc5"
"""SHA-256 of the calibration text in UTF-8, which names it in records of what was calibrated on it."""
EVALUATION_SHA256 = "0fe5027b244afe001611f137ba2bed6888d4858478a4187f1f9fae9274d4a553"
"""SHA-256 of the evaluation text in UTF-8."""


def _text(name: str, sha256: str) -> str:
    packed = files(__name__).joinpath(name).read_bytes()
    try:
        data = lzma.decompress(packed)
    except lzma.LZMAError:
        data = b""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise OSError(
            f"{name} of the package mq_quant.texts is damaged: its SHA-256 is not {sha256}. Reinstall mq-quant."
        )
    return data.decode()


def calibration_text() -> str:
    """The calibration text, about 4 MB in UTF-8 or a million tokens of M2.7's tokenizer. Documents are separated by
    an empty line. Raises OSError where the file is missing or damaged."""
    return _text("calibration.txt.xz", CALIBRATION_SHA256)


def evaluation_text() -> str:
    """The evaluation text, about 0.2 MB in UTF-8, of documents that the calibration text does not hold. Documents are
    separated by an empty line. Raises OSError where the file is missing or damaged."""
    return _text("evaluation.txt.xz", EVALUATION_SHA256)
