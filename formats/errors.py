"""The errors that mq-quant shows its users.

Each error says what is wrong, with which file and tensor, and what to do next. The command line prints the message
and exits with the class's `exit_code`: 2 for bad input, 1 for a failed check or a fault of the machine. Names and
values from files may hold anything, so a message shows every control character as an escape.
"""

from __future__ import annotations

import re
from enum import StrEnum, auto
from pathlib import Path
from typing import Any

from .text import printable, shortened


class MqError(Exception):
    """Base of every error with a message for the user; `hint` says what to do next."""

    exit_code = 2

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path | None = None,
        tensor: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = str(file) if file is not None else None
        self.tensor = tensor
        self.hint = hint
        super().__init__(self.render())

    @property
    def code(self) -> str:
        """The kind of error, for programs: the name of its class in small letters, such as `checkpoint` or `in_use`."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__.removesuffix("Error")).lower()

    def as_json(self) -> dict[str, Any]:
        """The error with its parts, as commands print it under `--json`."""
        return {
            "code": self.code,
            "problem": self.problem,
            "file": self.file,
            "tensor": self.tensor,
            "hint": self.hint,
            "exit_code": self.exit_code,
        }

    def render(self) -> str:
        """The whole message, safe to be shown; only line ends that the problem or the hint holds remain."""
        where = [
            shorten(part) for shorten, part in ((printable, self.file), (shortened, self.tensor)) if part
        ]
        text = printable(self.problem, keep="\n")
        hint = printable(self.hint or "", keep="\n")
        text = f"{': '.join(where)}: {text}" if where else text
        return f"{text}\n  {hint}" if hint else text


class ConfigError(MqError):
    """A config.json that is missing, not MiniMax-M2, or cannot be normalised."""


class CheckpointError(MqError):
    """A source checkpoint whose files or tensors are missing, broken or of the wrong shape."""


class WeightError(CheckpointError):
    """Weights that cannot be encoded: NaN codes, non-finite values, a K that is not a multiple of 256."""


class ImatrixError(MqError):
    """An imatrix that is unreadable, of another model, or without anything usable."""


class TokenError(MqError):
    """A text, token ids, a tokenizer or a chat template that cannot be used."""


class CalibrationError(MqError):
    """A calibration folder that cannot be used."""


class MeasurementError(MqError):
    """A measurement that is unreadable, not whole, or of another model."""


class BudgetError(MqError):
    """A size, a memory or a number of bits that no file of the model can have."""


class TuningError(MqError):
    """A file that cannot be tuned against this source."""


class InputError(MqError):
    """A file or folder that a command was given, and that is not what it takes or does not go with the others."""


class RecipeError(MqError):
    """A recipe that does not follow the schema."""


class PartError(MqError):
    """Parts of a build that cannot be put together, or a file that is none."""


class ClusterError(MqError):
    """A cluster that cannot be used, or a worker of it that failed."""

    exit_code = 1


class HfqKind(StrEnum):
    """Why an HFQ file is refused, or cannot be used as asked: one kind for each reason."""

    # Opening and reading
    UNOPENABLE = auto()  # the file cannot be opened
    UNREADABLE = auto()  # the file system reports a fault while the file is read
    CHANGED = auto()  # the file became shorter after it was opened
    TRUNCATED = auto()  # the file ends inside its header, index or padding
    # Header
    NOT_HFQ = auto()  # the file does not begin with HFQM
    VERSION = auto()  # the container version is not 1
    METADATA_OFFSET = auto()  # the metadata do not begin at byte 32
    DATA_OFFSET = auto()  # the payloads would begin behind the end of the file
    # Metadata
    METADATA_ENDLESS = auto()  # the JSON object has no end where it should
    METADATA_JSON = auto()  # the metadata are not one strict JSON object
    METADATA_SIZE = auto()  # the metadata are larger than readers take
    # Index
    COUNTS = auto()  # header and index count different numbers of tensors
    TOO_MANY = auto()  # more tensors than an index may have, or than fit into this one
    INDEX_SIZE = auto()  # the index is larger than readers take
    INDEX_END = auto()  # the index reaches into the payloads
    NAME_ENCODING = auto()  # a tensor's name is not UTF-8
    NAME = auto()  # a tensor's name is empty, too long or not printable
    NAME_TWICE = auto()  # two tensors have one name
    SHAPE = auto()  # a shape has too many dimensions, or one out of range
    FIELD = auto()  # a number of an index line is out of range
    GROUPS = auto()  # a shape does not fill whole groups of its format
    GROUP_SIZE = auto()  # the group size is not that of the format
    PAYLOAD_SIZE = auto()  # the payload's size does not follow from shape and format
    # Padding and payloads
    PADDING_SIZE = auto()  # too many unused bytes lie before the payloads
    PADDING = auto()  # the padding before the payloads is not zero
    PAYLOAD_END = auto()  # a payload reaches behind the end of the file
    CHECKSUM = auto()  # a payload's bytes are not those that were written
    # Use of a file that is whole
    NO_TENSOR = auto()  # the file has no tensor of this name
    UNKNOWN_FORMAT = auto()  # the tensor's block format is not known
    SCALE = auto()  # an AWQ scale does not fit the matrices that it scales
    OTHER_SHAPE = auto()  # a tensor has another shape than the file's config calls for
    PROVENANCE = auto()  # the file does not say, or not in our form, what it was made from
    # Writing
    LENGTH = auto()  # the bytes given for a payload are fewer or more than its index line states
    UNWRITABLE = auto()  # the file cannot be written


class HfqError(MqError):
    """A file that is not a well-formed HFQ container, or cannot be used as asked; `kind` says why, for programs."""

    def __init__(
        self,
        problem: str,
        *,
        kind: HfqKind,
        file: str | Path | None = None,
        tensor: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.kind = kind
        super().__init__(problem, file=file, tensor=tensor, hint=hint)

    @property
    def code(self) -> str:
        """`hfq.` and the kind."""
        return f"hfq.{self.kind}"


class OutputError(MqError):
    """The output cannot be written: it exists, or the disk is too small."""


class InUseError(OutputError):
    """Another process is at work on this file or folder right now."""


class ResumeError(MqError):
    """Unfinished work that was begun with other arguments or inputs, or whose files are damaged."""


class HubError(MqError):
    """The hub did not deliver what was asked for."""


class BackendError(MqError):
    """A compiler, driver or device that a kernel back end needs is missing or failed."""


class CheckError(MqError):
    """A verification or comparison ran and did not hold."""

    exit_code = 1
