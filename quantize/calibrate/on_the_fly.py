"""A calibration that a build gathers for itself: what a layer's experts see, just before the layer is encoded.

Besides the moments that all experts of the layer share, the rows are kept that they saw, so that each expert is rounded
under moments of its own. Both are dropped with the layer: between layers only the residual stream and the journal are
kept, beside the output. A layer whose moments are gone and needed again is gathered anew from the first layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...awq.from_imatrix import ImatrixModel
from ...awq.from_moments import calibration_record, coverage_of
from ...awq.own_moments import OwnMoments, with_rows
from ...formats.checkpoint.source import Source
from ...formats.errors import OutputError
from ...formats.minimax import ModelConfig
from ...formats.statistics.moment_file import DownForm
from ..spec.calibration_sizes import inline_sizes
from ..spec.provenance import flatten
from .folder import CalibrationFolder, discard_folder, manifest_text
from .layer_pass import device_record, enter, gather_layer, manifest_of, open_device
from .own_streams import load_stream, save_stream
from .tokens import Tokens

DOWN: DownForm = "pooled"
"""Only the layer's moment at down is kept: an expert's own follows from its rows when it is encoded."""


class GatheredImportance:
    """The importances of a model, gathered while it is built.

    Layers are begun in ascending order, all on one thread. Between two calls of `begin_layer`, `layer` may be called on
    any thread.
    """

    def __init__(
        self,
        source: Source,
        tokens: Tokens,
        device: str = "cpu",
        text: str | None = None,
        keep_outputs: bool = False,
    ) -> None:
        """Raises BackendError where there is no such device. `bind` completes it.

        `text` is the sha256 of the text that travels with the package, where the tokens are of that. With
        `keep_outputs` the stream behind the last layer is kept too, so that every layer has a `target`.
        """
        self.tokens = tokens
        self._keep_outputs = keep_outputs
        self.config: ModelConfig = source.config
        self._text = text
        self._source = source
        self.device = open_device(device)
        self._manifest = manifest_of(self.config, {}, tokens, DOWN, self.device)
        self._imatrix: ImatrixModel | None = None
        self._path: Path | None = None
        self._out: CalibrationFolder | None = None
        self.coverage = 0.0
        """Share of experts that saw a token, once `finish` has been called."""
        self._entering: Tensor | None = None

    def bind(self, source: Mapping[str, Any], imatrix: ImatrixModel | None) -> None:
        """Take the source's {origin, files}, and the imatrix that stands behind moments of too few tokens."""
        self._manifest = {**self._manifest, "source": dict(source)}
        self._imatrix = imatrix

    @property
    def disk_bytes(self) -> int:
        """The most disk that the moments of a layer and the residual streams around it take beside the output."""
        return inline_sizes(self.config, self.tokens.size, tuned=self._keep_outputs).disk_bytes

    def signature(self) -> dict[str, Any]:
        """What of it decides the built bytes, besides the source."""
        deciding = ("tokens", "down", "device", "gpu")
        kept = {key: value for key, value in self._manifest.items() if key in deciding}
        return {"rows": True, "torch": self._manifest["program"]["torch"], **kept}

    def record(self) -> dict[str, Any]:
        """What a file says of it, as far as it is known before the layers are through."""
        return self._record("", 0.0)

    def _record(self, sha256: str, coverage: float) -> dict[str, Any]:
        """Tokens, text and device are what it takes to gather the same again."""
        said = calibration_record(sha256, self._manifest["tokens"], DOWN, coverage)
        made_on = {"torch": torch.__version__, **device_record(self.device)}
        return {**said, "rows": True, "text": self._text, **made_on}

    def open(self, path: Path) -> None:
        """Begin, or continue what an unfinished build left in this folder; ResumeError where it is another's.

        The build holds the lock of its output. Raises OutputError where the folder is a link or holds anything else.
        """
        if path.is_symlink():
            raise OutputError(
                "is a symbolic link, which is not followed here", file=path, hint="remove the link"
            )
        self._path = path
        self._out = CalibrationFolder(path, dict(flatten(self._manifest)))
        if not self._out.journal.done:
            # Read before the build releases the embeddings, and kept until the first layer has run.
            self._entering = enter(self._source, self.config, self._out, self.tokens, 0)

    def close(self) -> None:
        """Let go of the folder, which stays for the next run."""
        if self._out is not None:
            self._out.close()
            self._out = None

    def discard(self) -> None:
        """Remove the folder."""
        self.close()
        if self._path is not None:
            discard_folder(self._path)

    def begin_layer(self, layer: int) -> None:
        """Have one layer's moments ready, and no others: nothing may need those of an earlier layer any more."""
        for earlier in range(layer):
            self._folder.drop(earlier)
        if layer < len(self._folder.journal.done) and not self._folder.intact(layer):
            self._restart()
        self._gather_up_to(layer)

    def layer(self, layer: int) -> OwnMoments:
        """The importances of the layer that was begun last."""
        behind = self._imatrix.layer(layer) if self._imatrix else None
        gathered = self._folder.layer(layer, self.config, DOWN, self._folder.record(layer), behind)
        return with_rows(gathered, self._folder.rows(layer, self.config, self.tokens.size))

    @property
    def shape(self) -> tuple[int, int, int]:
        """[sequences, length, hidden] of the residual streams."""
        return (*self.tokens.shape, self.config.hidden_size)

    def target(self, layer: int) -> NDArray[np.float32]:
        """The source's stream f32 behind a layer, until the next layer is begun; ResumeError where it is damaged."""
        return self._folder.hidden(layer + 1, self.shape)

    def save_own(self, layer: int, stream: NDArray[np.float32]) -> str:
        """Keep the stream f32 of the file that is built, which enters a layer; returns its sha256."""
        return save_stream(self._folder.path, layer, stream)

    def own(self, layer: int, sha256: str | None) -> NDArray[np.float32] | None:
        """The kept stream of this sha256 that enters a layer; None where there is none."""
        return load_stream(self._folder.path, layer, self.shape, sha256)

    def finish(self) -> dict[str, Any]:
        """What a file made with it says of it, as it would of the folder of `calibrate`; all layers must be through."""
        self._gather_up_to(self.config.num_hidden_layers - 1)
        sha256 = hashlib.sha256(manifest_text(self._manifest, self._records)).hexdigest()
        self.coverage = coverage_of(self.config, self._records)
        return self._record(sha256, self.coverage)

    @property
    def _folder(self) -> CalibrationFolder:
        if self._out is None:
            raise RuntimeError("GatheredImportance.open comes first")
        return self._out

    @property
    def _records(self) -> list[dict[str, Any]]:
        return [self._folder.record(n) for n in range(len(self._folder.journal.done))]

    def _gather_up_to(self, layer: int) -> None:
        """Run the model to the end of `layer`, from where the last run of it stopped."""
        for n in range(len(self._folder.journal.done), layer + 1):
            hidden, self._entering = self._entering, None
            if hidden is None:
                hidden = enter(self._source, self.config, self._folder, self.tokens, n)
            entering = hidden.to(self.device)
            gather_layer(
                self._source,
                self.config,
                n,
                entering,
                self._folder,
                DOWN,
                keep_rows=True,
                keep_last=self._keep_outputs,
            )
            if n < layer:
                self._folder.drop(n)

    def _restart(self) -> None:
        """Begin the run of the model anew: the moments of a layer are gone that has to be encoded once more."""
        assert self._path is not None
        self.discard()
        self.open(self._path)
