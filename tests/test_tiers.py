"""Every tier from end to end: rebuilt to its committed hash, read by independent code, and close to the FP8 source."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import calibrated_hashes
import independent
import numpy as np
import pytest
from mq_quant.formats.hfq import open_hfq
from mq_quant.kernels.runtime.host import open_backend
from mq_quant.quantize.inspect.verify_inputs import VerifyOptions, inputs_of
from mq_quant.quantize.pipeline.build import BuildResult, RunOptions, build_file
from mq_quant.quantize.pipeline.build_spec import UNCHANGED, RecipeChanges
from mq_quant.quantize.pipeline.statistics import ImatrixFile, NoStatistics, Statistics
from mq_quant.quantize.spec.layer_hashes import bundled_table, file_hashes
from mq_quant.quantize.spec.places import TINY, choose_recipe
from mq_quant.quantize.spec.recipe import load_tier
from mq_quant.quantize.tiny.folder import ensure_tiny
from mq_quant.verify.run import Verification, verify

TIERS = ("mq4", "mq3-lloyd", "mq3", "mq2-lloyd", "mq2", "mq2-mini")
FORMATS = {
    "mq4": (13, 13),
    "mq3-lloyd": (20, 13),
    "mq3": (20, 20),
    "mq2-lloyd": (19, 13),
    "mq2": (19, 20),
    "mq2-mini": (19, 19),
}
# dB in weight space. Nearest rounding reaches what the formats can hold on Gaussian-like blocks; under the Hessian, and
# with the gain, it falls, because precision goes to the channels that matter.
NEAREST = {3: 38.0, 13: 20.0, 19: 9.4, 20: 15.1}
WEIGHTED = {3: 38.0, 13: 17.0, 19: 6.0, 20: 11.5}
_MODELS = os.environ.get("MQ_QUANT_MODELS")
trained = pytest.mark.skipif(not _MODELS, reason="MQ_QUANT_MODELS is not set")

Weights = dict[str, np.ndarray]


def make(
    path: Path,
    tier: str,
    source: str = TINY,
    statistics: Statistics | None = None,
    changes: RecipeChanges = UNCHANGED,
) -> BuildResult:
    return build_file(choose_recipe(tier, None, source), statistics, RunOptions(path, 2), changes)


@pytest.fixture(scope="module")
def source() -> Weights:
    return independent.safetensors(ensure_tiny())


@pytest.fixture(scope="module")
def tiny_tier(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, BuildResult]]:
    folder = tmp_path_factory.mktemp("tiers")
    built: dict[str, BuildResult] = {}

    def get(tier: str) -> tuple[Path, BuildResult]:
        path = folder / f"tiny.{tier}"
        if tier not in built:
            built[tier] = make(path, tier)
        return path, built[tier]

    return get


def read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, np.ndarray]]]:
    """Metadata, and every tensor's quant_type and values in the source's basis, AWQ scales divided out."""
    metadata, tensors = independent.hfq(path)
    out = {}
    for name, tensor in tensors.items():
        values = independent.decode(tensor)
        if re.search(r"experts\.\d+\.w[13]\.weight$", name):
            layer = name.split(".")[2]
            scale = tensors.get(f"model.layers.{layer}.block_sparse_moe.awq_scale_gate_up.weight")
            if scale is not None:
                assert scale[0] == 1
                values = values / independent.decode(scale)
        out[name] = (tensor[0], values)
    return metadata, out


def check(path: Path, tier: str, source: Weights, floor: dict[int, float], scaled: bool = True) -> None:
    metadata, tensors = read(path)
    scales = [name for name in tensors if name.endswith("awq_scale_gate_up.weight")]
    assert len(scales) == (metadata["config"]["num_hidden_layers"] if scaled else 0)
    assert set(tensors) - set(scales) == set(source)
    gate_up, down = FORMATS[tier]
    for name, weights in source.items():
        quant_type, values = tensors[name]
        assert values.shape == weights.shape
        if ".experts." in name:
            assert quant_type == (down if name.endswith("w2.weight") else gate_up), name
        if quant_type in (1, 2):
            assert np.array_equal(values, weights), name
        else:
            assert independent.snr(weights, values) >= floor[quant_type], name


@pytest.mark.parametrize("tier", TIERS)
def test_a_tier_is_rebuilt_to_its_committed_hash(tier: str, tiny_tier: Callable[[str], Any]) -> None:
    path, result = tiny_tier(tier)
    assert result.quantization_hash == load_tier(tier, TINY).quantization_hash, "see `make hashes`"
    table = bundled_table(TINY)
    with open_hfq(path) as file:
        assert table is not None and file_hashes(file) == table.tiers[tier]
    assert result.coverage == 1.0


@pytest.mark.parametrize("tier", TIERS)
def test_an_independent_reader_finds_the_source_in_every_tensor(
    tier: str, tiny_tier: Callable[[str], Any], source: Weights
) -> None:
    path, _ = tiny_tier(tier)
    check(path, tier, source, WEIGHTED)


def verdict_on(path: Path, wanted: VerifyOptions) -> Verification:
    with open_hfq(path) as file, open_backend("cpu") as backend:
        return verify(file, backend, inputs_of(file, wanted))


@pytest.mark.parametrize("tier", calibrated_hashes.TIERS)
def test_a_calibrated_tier_is_rebuilt_to_its_committed_hash(tier: str, tmp_path: Path) -> None:
    known = calibrated_hashes.committed()
    if calibrated_hashes.probe() != known["probe"]:
        pytest.skip("sums of torch and LAPACK come out otherwise here than where the hashes were made")
    assert calibrated_hashes.built(tier, tmp_path / tier) == known["tiers"][tier], (
        "see tests/calibrated_hashes.py"
    )


@pytest.mark.parametrize("tier", TIERS)
def test_a_tier_passes_verification(tier: str, tiny_tier: Callable[[str], Any]) -> None:
    path, result = tiny_tier(tier)
    verdict = verdict_on(path, VerifyOptions(tokens=24, generate=1))
    verdict.raise_if_failed()
    names = [s.name for s in verdict.stages]
    assert names == ["structure", "decode", "forward", "fidelity", "predictions", "generation"]
    assert verdict.as_json()["stages"][0]["quantization_hash"] == result.quantization_hash
    assert verdict.as_json()["stages"][1]["tensors"] == result.tensor_count


@pytest.mark.parametrize("tier", ["mq2-lloyd", "mq3"])
def test_nearest_rounding_reaches_what_the_formats_can_hold(
    tier: str, tmp_path: Path, source: Weights
) -> None:
    make(tmp_path / "plain", tier, statistics=NoStatistics())
    check(tmp_path / "plain", tier, source, NEAREST, scaled=False)


def test_the_scale_is_multiplied_into_weights_and_divided_out_of_inputs(
    tmp_path: Path, source: Weights, tiny_tier: Callable[[str], Any]
) -> None:
    make(tmp_path / "scaled", "mq4", changes=RecipeChanges(alpha=0.5))
    _, tensors = independent.hfq(tmp_path / "scaled")
    scale = independent.decode(tensors["model.layers.1.block_sparse_moe.awq_scale_gate_up.weight"])
    assert scale.std() > 0.1
    name = "model.layers.1.block_sparse_moe.experts.5.w1.weight"
    x = np.random.default_rng(0).normal(size=scale.size)
    unquantised = (source[name] * scale) @ (x / scale)
    assert np.allclose(unquantised, source[name] @ x, rtol=1e-12)
    stored = independent.decode(tensors[name]) @ (x / scale)
    true = source[name] @ x
    assert independent.snr(true, stored) > 15
    assert independent.snr(true, independent.decode(tensors[name]) @ (x * scale)) < 5


@trained
@pytest.mark.parametrize("tier", TIERS)
def test_a_trained_checkpoint_goes_through_every_tier(tier: str, tmp_path: Path) -> None:
    folder = Path(str(_MODELS)) / "trained-tiny"
    result = make(tmp_path / "out", tier, str(folder), ImatrixFile(folder / "imatrix.gguf"))
    assert result.coverage > 0.9
    metadata, _ = independent.hfq(tmp_path / "out")
    assert metadata["config"]["num_hidden_layers"] == 4
    assert metadata["quantization_hash"]["value"] == result.quantization_hash
    verdict_on(tmp_path / "out", VerifyOptions(source=str(folder), tokens=16, generate=0)).raise_if_failed()
