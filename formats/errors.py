"""The errors that mq-quant shows its users.

Each error says what is wrong, with which file and tensor, and what to do next. The command line prints the message
and exits with the class's `exit_code`: 2 for bad input, 1 for a failed check or a fault of the machine. Names and
values from files may hold anything, so a message shows every control character as an escape.
"""

from __future__ import annotations

from pathlib import Path

from .text import printable


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

    def render(self) -> str:
        """The whole message, safe to be shown; only line ends that the problem or the hint holds remain."""
        where = [printable(part) for part in (self.file, self.tensor) if part]
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


class CalibrationError(MqError):
    """Calibration text, tokens or a calibration folder that cannot be used."""


class RecipeError(MqError):
    """A recipe that does not follow the schema."""


class HfqError(MqError):
    """A file that is not a well-formed HFQ container."""


class OutputError(MqError):
    """The output cannot be written: it exists, or the disk is too small."""


class ResumeError(MqError):
    """An unfinished build that belongs to a different job, or whose journal is broken."""


class HubError(MqError):
    """The hub did not deliver what was asked for."""


class BackendError(MqError):
    """A compiler, driver or device that a kernel back end needs is missing or failed."""


class CheckError(MqError):
    """A verification or comparison ran and did not hold."""

    exit_code = 1
