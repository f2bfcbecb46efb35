"""The choices that options offer are those that the pipeline knows; a contradiction is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from mq_quant.formats.statistics.moment_file import DOWN_FORMS
from mq_quant.kernels.runtime.host import BACKENDS
from mq_quant.quantize.cli import options
from mq_quant.quantize.cli.app import main
from mq_quant.quantize.encode.encoders import DEVICES
from mq_quant.quantize.spec.recipe import Effort, Fit


def test_choices_are_those_of_the_pipeline() -> None:
    assert get_args(options.Fit) == get_args(Fit)
    assert get_args(options.BuildDevice) == ("auto", *DEVICES)
    assert get_args(options.Effort) == get_args(Effort)
    assert get_args(options.DownForm) == DOWN_FORMS
    assert set(get_args(options.Backend)) == {"auto", *BACKENDS}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("verify x --chat", "--prompt"),
        ("verify x --prompt a --token-file b", "--token-file"),
        ("verify x --dump-hidden nowhere/at/all", "its folder does not exist"),
        ("verify x --report nowhere/at/all", "its folder does not exist"),
        ("verify x --backend abacus", "'abacus' is not one of 'auto'"),
        ("build --tier mq2 --effort imatrix --text a", "give one of the two"),
        ("build --tier mq2 --no-imatrix --sequences 2", "give one of the two"),
        ("build --tier mq2 --text a --tokens b", "either --text or --tokens"),
        ("build --tier mq2 --effort most", "'most' is not one of 'imatrix'"),
        ("build --tier mq2 --calibration a --effort tuned", "give one of the two"),
        ("build --tier mq2 --no-imatrix --imatrix a", "give one of the two"),
        ("build --tier mq2 --sensitivity --calibration a", "--sensitivity goes with --effort"),
        ("build --tier mq2 --sensitivity --effort imatrix", "--sensitivity goes with --effort"),
        ("build --tier mq2 --sensitivity --fit exact", "the fit `hessian`"),
        (
            "build --tier mq2 --part 1/2 --no-sensitivity --calibration-state a",
            "--calibration-state has what errors",
        ),
        ("build --tier mq2 --fit best", "'best' is not one of 'reference'"),
        ("build --tier mq2 --awq-alpha 3", "--awq-alpha"),
        ("calibrate --source a -o b --text c --tokens d", "either --text or --tokens"),
        ("calibrate --source a -o b --text c --down half", "'half' is not one of 'full'"),
        ("calibrate --source a -o b --text c --tier mq2", "--propagate quantised"),
        ("inspect x --groups 0", "--groups"),
        ("inspect x --groups 3", "--groups goes with --tensor"),
        ("inspect x --provenance --filter a", "--provenance is shown alone"),
        ("inspect x --provenance --tensor a", "--provenance is shown alone"),
        ("build --tier mq2 --tokens a --length 64", "leave --length out"),
        ("calibrate --source a -o b --tokens c --length 512", "leave --length out"),
        ("calibrate --source a -o b --streams 2 --down full", "leave --propagate, --down"),
        ("measure --source tiny --tokens c --length 64", "leave --length out"),
        ("measure --source tiny --effort imatrix --sequences 4", "--held-out says"),
        ("measure --source tiny --calibration a --sequences 4", "--held-out says"),
        ("measure --source tiny --effort imatrix --judge-tokens a --text b", "leave --text, --tokens"),
        ("tune x --source tiny --tokens c --length 64", "leave --length out"),
        ("reproduce x --tokens c --length 64", "leave --length out"),
        ("evaluate x --source tiny --tokens c --length 64", "leave --length out"),
        ("evaluate x --reference a --length 64", "--reference holds its own tokens"),
        ("evaluate x --reference a --save-reference b", "--save-reference saves what a source"),
        ("regenerate --from x --revision main", "leave --layers"),
        ("kit --check x --force", "--force goes with --out"),
        ("recipes mq2 --force", "--force goes with --copy"),
        ("verify x --tokens 0 --token-file a", "--tokens 0 runs nothing"),
        ("verify x --tokens 0 --dump-hidden a", "--tokens 0 runs nothing"),
    ],
)
def test_options_that_do_not_fit_are_bad_input(
    line: str, named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert named in " ".join(err.replace("│", "").split())
    assert list(tmp_path.iterdir()) == []
