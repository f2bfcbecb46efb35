"""What is refused before an evaluation begins: files of other models, and outputs that cannot be written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...formats.errors import OutputError
from ...formats.hfq import HfqFile
from ...formats.hfq.stored import config_of
from ...formats.minimax import ModelConfig
from ...verify.against_source import check_dimensions
from ...verify.evaluate.saved_reference import reference_bytes
from ...verify.model.hfq_weights import check_shapes
from ..spec.calibration_sizes import evaluation_sizes
from ..write.outputs import check_output, check_work_fits
from .reference import Reference


def check_models(files: Sequence[HfqFile], reference: Reference) -> None:
    """InputError or HfqError where a file cannot be compared with the others or the reference, on metadata alone."""
    expected = reference.source.config if reference.source else config_of(files[0])
    for file in files:
        config = config_of(file)
        check_dimensions(file, config, expected)
        check_shapes(file, config)
        reference.check_vocabulary(file, config)


def check_outputs(
    output: Path, saved: Path | None, reference: Reference, config: ModelConfig, files: int, force: bool
) -> None:
    """OutputError where an output exists, has no folder, or the work does not fit on its disk. Touches nothing."""
    check_output(output, force)
    if saved is not None:
        check_output(saved, force, stream=True)
    if saved is not None and reference.source is None:
        raise OutputError(
            "there is nothing to save: the source is not run",
            file=saved,
            hint="give --source in place of --reference",
        )
    positions = reference.tokens.size
    needed = evaluation_sizes(config, positions, files + (reference.source is not None)).disk_bytes
    needed += reference.source.disk_bytes() if reference.source else 0
    needed += reference_bytes(positions, config.vocab_size) if saved is not None else 0
    check_work_fits(output, needed, "--sequences")
