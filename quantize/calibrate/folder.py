"""A calibration folder while it is written: a journal, the hidden states between layers, and at the end the manifest.

After each layer the folder holds that layer's file, the residual stream behind it, and a journal line that names the
hashes of both: a run that was killed continues after the last such line. The journal is the folder's lock.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...awq.from_imatrix import ImatrixLayer
from ...awq.from_moments import CalibratedLayer, read_layer
from ...formats.errors import CalibrationError, OutputError, ResumeError
from ...formats.file_lock import OWNER
from ...formats.minimax import ModelConfig
from ...formats.own_file import check_folder_place, disk_errors, free_bytes
from ...formats.statistics.imatrix import GGUF_NAMES, ImatrixEntry, write_imatrix
from ...formats.statistics.moment_file import Arrays, DownForm, encode_layer, layer_file, open_layer_file
from ...formats.statistics.moment_folder import IMATRIX, MANIFEST, SCHEMA
from ...formats.statistics.row_file import ExpertRows, open_rows, row_file
from ...formats.unchanged import UnchangedFile
from ..write.atomic import write_atomic
from ..write.journal import CALIBRATION, Journal, Signature
from ..write.stream_folder import read_stream

JOURNAL = "journal"
STATE = "state.json"
"""What a finished calibration state has instead of a manifest."""
ATTN_NAMES = {"attn_q": "in", "attn_k": "in", "attn_v": "in", "attn_output": "out"}
_SENSITIVITY = (
    rf"sensitivity\.journal({re.escape(OWNER)}(\.\d+)?)?|sensitivity-\d+\.safetensors"
    r"|(stream|gradient)-\d+\.f32"
)
_OURS = re.compile(
    rf"{re.escape(MANIFEST)}|{re.escape(STATE)}|{JOURNAL}({re.escape(OWNER)}(\.\d+)?)?|{re.escape(IMATRIX)}"
    rf"|{_SENSITIVITY}|(layer|rows)-\d+\.safetensors|hidden-\d+\.f32|\..+\.partial"
)
_OF_SENSITIVITY = re.compile(_SENSITIVITY)
_RESTART = "give --restart to discard it and begin anew"


def hidden_file(layer: int) -> str:
    """The residual stream that enters a layer."""
    return f"hidden-{layer:05d}.f32"


class CalibrationFolder:
    """A folder being written; a context manager that holds its journal locked."""

    def __init__(self, path: Path, signature: Signature, force: bool = False, restart: bool = False) -> None:
        """Lock a folder, made where there is none; then begin a calibration there, or continue the one that it holds.

        Raises InUseError where another process writes there, OutputError where the folder holds a finished calibration
        (without `force`) or anything else, ResumeError where it was begun with other arguments.
        """
        self.path = path
        if path.is_dir():
            _look(path, force, restart)
        made = _make(path)
        self.journal = Journal(path / JOURNAL, CALIBRATION)
        try:
            anew = _look(path, force, restart)
            if anew:
                _clear(path)
            self.journal.begin(signature, anew)
        except BaseException:
            self.journal.close()
            if made:
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise

    def __enter__(self) -> CalibrationFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder, which stays for the next run."""
        self.journal.close()

    def check_space(self, needed: int) -> None:
        """Refuse a disk that cannot hold `needed` bytes, those that an earlier run wrote among them; OutputError."""
        with disk_errors(self.path):
            free = free_bytes(self.path)
            held = sum(f.stat().st_size for f in self.path.iterdir())
        if free is not None and free + held < needed:
            raise OutputError(
                f"needs {needed / 1e9:.1f} GB and its disk has {(free + held) / 1e9:.1f} GB free",
                file=self.path,
                hint="free some space, use another disk, or give --down pooled, which is much smaller",
            )

    def done(self) -> list[dict[str, Any]]:
        """The records of the layers that an earlier run finished, their files checked; ResumeError if damaged."""
        records = []
        for layer in range(len(self.journal.done)):
            if not self.intact(layer):
                raise ResumeError(
                    "is not as the earlier run left it", file=self.path / layer_file(layer), hint=_RESTART
                )
            records.append(self.record(layer))
        return records

    def record(self, layer: int) -> dict[str, Any]:
        """What the journal says of a finished layer."""
        return self.journal.done[f"layer.{layer}"]

    def intact(self, layer: int) -> bool:
        """Whether a layer is finished, and its files are there as they were written."""
        record = self.journal.done.get(f"layer.{layer}")
        if record is None:
            return False
        files = {layer_file(layer): record["sha256"], row_file(layer): record.get("rows")}
        return all(_holds(self.path / name, sha256) for name, sha256 in files.items() if sha256)

    def drop(self, layer: int) -> None:
        """Remove a finished layer's moments and rows, and the streams before it; its record stays."""
        with disk_errors(self.path):
            for name in (layer_file(layer), row_file(layer), hidden_file(layer)):
                (self.path / name).unlink(missing_ok=True)

    def has_hidden(self, layer: int) -> bool:
        """Whether the residual stream that enters a layer is there as it was saved; that of the first never is."""
        before = self.journal.done.get(f"layer.{layer - 1}")
        return before is not None and _holds(self.path / hidden_file(layer), before["hidden"])

    def hidden(self, layer: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The residual stream f32 that enters a layer, as saved; ResumeError where it is damaged."""
        expected = self.journal.done[f"layer.{layer - 1}"]["hidden"]
        return read_stream(self.path / hidden_file(layer), shape, expected, _RESTART)

    def write_layer(self, layer: int, arrays: Arrays) -> dict[str, Any]:
        """Make one layer's file durable; returns its {bytes, sha256} for `finish_layer`."""
        return asdict(write_atomic(self.path / layer_file(layer), encode_layer(arrays)))

    def write_rows(self, layer: int, arrays: Arrays) -> str:
        """Make what the experts of a layer saw durable; returns the sha256 of the file, for `finish_layer`."""
        return write_atomic(self.path / row_file(layer), encode_layer(arrays)).sha256

    def rows(self, layer: int, config: ModelConfig, tokens: int) -> ExpertRows:
        """What the experts of a layer saw, where it was kept."""
        return open_rows(self.path / row_file(layer), config, tokens)

    def layer(
        self,
        layer: int,
        config: ModelConfig,
        down: DownForm,
        record: Mapping[str, Any] | None = None,
        imatrix: ImatrixLayer | None = None,
    ) -> CalibratedLayer:
        """The importances in a layer's file; the notes are those of `record`, and so is the hash, where it is given.

        Raises CalibrationError where the file has changed.
        """
        path, record = self.path / layer_file(layer), record or {}
        file = open_layer_file(path, config, down, record.get("sha256"))
        return read_layer(file, config, layer, record, imatrix)

    def finish_layer(
        self,
        layer: int,
        hidden: Iterable[memoryview] | None,
        record: dict[str, Any],
        keep_entering: bool = False,
    ) -> None:
        """Make the residual stream f32 behind a written layer durable (None after the last), then the journal's line.

        The stream before the layer goes, unless it is to be kept until the layer is dropped.
        """
        if hidden is not None:
            record["hidden"] = write_atomic(self.path / hidden_file(layer + 1), hidden).sha256
        self.journal.record(f"layer.{layer}", record["sha256"], **record)
        if not keep_entering:
            with disk_errors(self.path):
                (self.path / hidden_file(layer)).unlink(missing_ok=True)

    def complete(
        self, config: ModelConfig, manifest: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
    ) -> None:
        """Write the imatrix and, last, the manifest; then drop what only an unfinished run needs."""
        tokens = manifest["tokens"]
        text = manifest_text(manifest, records)
        write_imatrix(
            self.path / IMATRIX,
            imatrix_entries(self.path, config, manifest["down"]),
            [f"tokens sha256 {tokens['sha256']}"],
            tokens["sequences"],
            tokens["length"],
        )
        write_atomic(self.path / MANIFEST, [memoryview(text)])
        self.journal.remove()


def _holds(path: Path, sha256: str) -> bool:
    """Whether a file is there with these contents."""
    return path.is_file() and UnchangedFile(path, CalibrationError).sha256() == sha256


def manifest_text(manifest: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> bytes:
    """The bytes of the manifest of these layers."""
    keep = ("bytes", "sha256", "tokens", "unseen", "notes")
    layers = [{key: record[key] for key in keep} for record in records]
    whole = {"schema": SCHEMA, **manifest, "layers": layers}
    return (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode()


def discard_folder(path: Path, but_sensitivities: bool = False) -> None:
    """Remove a calibration folder and what is ours in it; anything else stays, and the folder with it.

    A link to a folder stays as it is, with everything behind it. What errors behind layers cost may stay too.
    """
    if path.is_symlink() or not path.is_dir():
        return
    with disk_errors(path):
        for file in path.iterdir():
            if _OURS.fullmatch(file.name) and not (
                but_sensitivities and _OF_SENSITIVITY.fullmatch(file.name)
            ):
                file.unlink()
    with contextlib.suppress(OSError):
        path.rmdir()


def check_folder(path: Path, force: bool, restart: bool) -> None:
    """Before any work: OutputError where no calibration can be begun or continued in a folder. Touches nothing."""
    check_folder_place(path)
    if path.is_dir():
        _look(path, force, restart)
    elif not path.parent.is_dir():
        raise _no_parent(path)


def _no_parent(path: Path) -> OutputError:
    return OutputError("its folder does not exist", file=path, hint=f"mkdir -p {path.parent}")


def _make(path: Path) -> bool:
    """Make the folder where there is none; returns whether it was made. OutputError where that cannot be."""
    if path.is_dir():
        return False
    if path.exists() or path.is_symlink():
        raise OutputError("is not a folder", file=path, hint="give -o a folder")
    if not path.parent.is_dir():
        raise _no_parent(path)
    with disk_errors(path):
        path.mkdir(exist_ok=True)
    return True


def _look(path: Path, force: bool, restart: bool) -> bool:
    """Whether what the folder holds is to be replaced; OutputError where it may be neither continued nor replaced."""
    found = {f.name for f in path.iterdir()}
    strange = sorted(name for name in found if not _OURS.fullmatch(name))
    if strange:
        raise OutputError(
            f"holds {strange[0]}, which is no calibration", file=path, hint="give -o a new folder"
        )
    journal = path / JOURNAL
    finished, begun = (
        MANIFEST in found or STATE in found,
        journal.is_symlink() or (JOURNAL in found and journal.stat().st_size > 0),
    )
    others = sorted(
        name for name in found if not (name.startswith(JOURNAL) or _OF_SENSITIVITY.fullmatch(name))
    )
    if finished and not (force or restart):
        raise OutputError("holds a finished calibration", file=path, hint="give --force to replace it")
    if others and not (finished or begun or restart):
        raise OutputError(f"holds {others[0]} but no {JOURNAL}", file=path, hint=_RESTART)
    return finished or restart


def _clear(path: Path) -> None:
    """Remove a calibration from a locked folder, first what says that it is finished; the journal, its lock, stays."""
    with disk_errors(path):
        for name in (MANIFEST, STATE):
            (path / name).unlink(missing_ok=True)
        for file in path.iterdir():
            if not file.name.startswith(JOURNAL):
                file.unlink()


def imatrix_entries(path: Path, config: ModelConfig, down: DownForm) -> dict[str, ImatrixEntry]:
    """The statistics of all layers' files under llama.cpp's names."""
    out = {}
    for layer in range(config.num_hidden_layers):
        file = path / layer_file(layer)
        tensors = open_layer_file(file, config, down)
        counts = tensors.array("attn.counts").astype(np.float64)
        for name, side in ATTN_NAMES.items():
            count = counts[:1] if side == "in" else counts[1:]
            out[f"blk.{layer}.{name}.weight"] = ImatrixEntry(
                tensors.array(f"attn.{side}.diagonal")[None], count
            )
        for projection, name in GGUF_NAMES.items():
            kind = "down" if projection == "w2" else "gate_up"
            seen = tensors.array(f"{kind}.counts").astype(np.float64)
            out[f"blk.{layer}.{name}.weight"] = ImatrixEntry(tensors.array(f"{kind}.diagonal"), seen)
    return out
