"""What errors behind layers cost: found by a run forward and back, whatever interrupts it, to the same files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_model
import torch
from build_hooks import StopError
from mq_quant.formats.checkpoint.local import Checkpoint, open_checkpoint
from mq_quant.formats.errors import CalibrationError, OutputError, ResumeError
from mq_quant.quantize.calibrate import sensitivity
from mq_quant.quantize.calibrate.sensitivity import JOURNAL, SensitivityRun
from mq_quant.quantize.calibrate.sensitivity_files import (
    first_tokens,
    read_sensitivity,
    sensitivity_file,
    sensitivity_record,
)
from mq_quant.quantize.spec.calibration_sizes import SENSITIVITY_TOKENS
from mq_quant.verify.model.reference import embed, layer_forward, load, rms_norm
from watching import Heard

LAYERS = 3
CONFIG = {**small_model.CONFIG, "num_hidden_layers": LAYERS}
TOKENS = np.random.default_rng(0).integers(0, 300, (3, 20)).astype(np.int32)
SIGNATURE = {"tokens": "these"}
CPU = torch.device("cpu")
FILES = [*map(sensitivity_file, range(LAYERS)), JOURNAL]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Its predictions are not so sure that gradients vanish."""
    content = small_model.tensors(config=CONFIG)
    content["lm_head.weight"] *= 0.05
    return open_checkpoint(small_model.save(tmp_path_factory.mktemp("small"), content, config=CONFIG))


@pytest.fixture(autouse=True)
def few_threads(one_thread: None) -> None:
    """Every test here."""


def found(source: Checkpoint, folder: Path, watch: Any = None, **signature: str) -> dict[int, str]:
    with closing(SensitivityRun(folder, source.config, SIGNATURE | signature)) as run:
        run.complete(source, TOKENS, CPU, watch or Heard())
        return run.hashes


@pytest.fixture(scope="module")
def whole(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run in one go."""
    folder = tmp_path_factory.mktemp("whole")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found(source, folder)
    torch.set_num_threads(before)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != JOURNAL}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def stopping(at: int) -> Iterator[Callable[[], int]]:
    """A block in which the step of this number, of all that touch the disk, is never begun; gives the steps so far."""
    steps, one = 0, threading.Lock()
    owners = {sensitivity.StreamFolder: ("save_pieces", "drop"), sensitivity.Journal: ("record",)}

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any, **more: Any) -> Any:
            nonlocal steps
            with one:
                if steps == at:
                    raise StopError
                steps += 1
            return real(*given, **more)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for owner, methods in owners.items():
            for name in methods:
                patch.setattr(owner, name, counted(getattr(owner, name)))
        patch.setattr(sensitivity, "write_sensitivity", counted(sensitivity.write_sensitivity))
        yield lambda: steps


def test_it_is_the_moment_of_unit_gradients_behind_each_layer(source: Checkpoint, tmp_path: Path) -> None:
    """Against autograd through all layers at once, in f64, for the tokens that the run draws."""
    hashes = found(source, tmp_path)
    cfg, wide = source.config, torch.float64
    streams = [embed(source, TOKENS, wide)]
    for layer in range(LAYERS):
        streams.append(layer_forward(source, cfg, layer, streams[-1].requires_grad_()))
        streams[-1].retain_grad()
    norm = load(source, "model.norm.weight", streams[-1])
    logits = rms_norm(streams[-1], norm, cfg.rms_norm_eps) @ load(source, "lm_head.weight", streams[-1]).T
    draws = torch.from_numpy(np.random.default_rng(0).random(TOKENS.shape, np.float32))
    drawn = torch.searchsorted(logits.softmax(-1).cumsum(-1), draws[..., None].double())
    logits.log_softmax(-1).gather(-1, drawn).sum().backward()  # type: ignore[no-untyped-call]
    for layer in range(LAYERS):
        made = read_sensitivity(tmp_path, layer, cfg, hashes[layer])
        gradient = streams[layer + 1].grad
        assert gradient is not None and made.tokens == TOKENS.size
        unit = torch.nn.functional.normalize(gradient.flatten(0, 1), dim=1)
        want = (unit.T @ unit / TOKENS.size).numpy()
        np.testing.assert_allclose(made.moment, want, atol=1e-3 * np.abs(want).max())
        assert np.trace(made.moment) == pytest.approx(1, abs=1e-5)


def test_a_run_that_is_killed_at_any_step_continues_to_the_same_files(
    source: Checkpoint, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """On the way forward, on the way back, and between what is written and what the journal says of it."""
    last = at = 0
    while at <= last:
        folder = tmp_path / str(at)
        folder.mkdir()
        with stopping(at) as steps:
            try:
                found(source, folder)
            except StopError:
                last = at + 1
        found(source, folder)
        assert contents(folder) == whole, f"killed at step {at}"
        assert names(folder) == FILES
        at += 1
    assert last == steps() > 8 * LAYERS


def test_a_run_that_is_killed_again_and_again_never_goes_back(source: Checkpoint, tmp_path: Path) -> None:
    """Each run of a layer, forward or back, is done once."""
    said: list[str] = []
    while len(said) < 2 * LAYERS:
        with pytest.raises(StopError):
            found(source, tmp_path, Heard(then=lambda doing: stop(doing, said)))
    heard = Heard()
    found(source, tmp_path, heard)
    assert heard.phases == []
    forward, back = [f"layer {n}" for n in range(LAYERS)], [f"layer {n}, back" for n in range(LAYERS)]
    assert said == [*forward, *reversed(back)]


def stop(doing: str, said: list[str]) -> None:
    if doing.startswith("layer"):
        said.append(doing)
        raise StopError


def test_what_a_watch_hears_adds_up(source: Checkpoint, tmp_path: Path) -> None:
    heard = Heard()
    (tmp_path / "whole").mkdir()
    found(source, tmp_path / "whole", heard)
    total, before, counted = heard.phase("finding what errors cost")
    assert before == 0 and counted == total
    for said in ("layer 1", "layer 2, back"):
        (folder := tmp_path / said).mkdir()
        with pytest.raises(StopError):
            found(source, folder, Heard(then=lambda doing, said=said: stop_at(doing, said)))  # type: ignore[misc]
        found(source, folder, again := Heard())
        total, before, counted = again.phase("finding what errors cost")
        assert 0 < before < counted == total


def stop_at(doing: str, last: str) -> None:
    if doing == last:
        raise StopError


@pytest.mark.parametrize(
    ("said", "file"),
    [
        ("layer 1", "stream-00002.f32"),
        ("layer 2", "stream-00003.f32"),
        ("layer 2, back", "gradient-00001.f32"),
        ("layer 2, back", "stream-00001.f32"),
        ("layer 1, back", "sensitivity-00001.safetensors"),
        ("layer 0, back", "sensitivity-00002.safetensors"),
    ],
)
def test_what_is_damaged_is_named_with_the_way_out(
    said: str, file: str, source: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(StopError):
        found(source, tmp_path, Heard(then=lambda doing: stop_at(doing, said)))
    good = (tmp_path / file).read_bytes()
    wrong = bytes([good[0] ^ 1])
    for content in (wrong + good[1:], good[:-1], b"", None):
        (tmp_path / file).unlink()
        if content is not None:
            (tmp_path / file).write_bytes(content)
        with pytest.raises(ResumeError, match=rf"{file}: is not as the earlier run left it") as refused:
            found(source, tmp_path)
        assert "--restart" in str(refused.value.hint)
        if content is None:
            (tmp_path / file).write_bytes(good)
    assert found(source, tmp_path).keys() == set(range(LAYERS))


def test_the_run_of_another_calibration_is_refused_by_name(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        found(source, tmp_path, Heard(then=lambda doing: stop_at(doing, "layer 1, back")))
    before = names(tmp_path)
    with pytest.raises(ResumeError, match=r"tokens is 'these' there and 'others' here") as refused:
        found(source, tmp_path, tokens="others")
    assert "--restart" in str(refused.value.hint) and names(tmp_path) == before


def test_a_run_that_did_nothing_leaves_nothing(source: Checkpoint, tmp_path: Path) -> None:
    SensitivityRun(tmp_path, source.config, SIGNATURE).close()
    assert names(tmp_path) == []
    (tmp_path / "folder").touch()
    with pytest.raises(OutputError, match="in the way"):
        SensitivityRun(tmp_path / "folder", source.config, SIGNATURE)


class Broken:
    """A source whose weights of one layer are not finite, or whose head says nothing of the stream."""

    def __init__(self, inner: Checkpoint, name: str, value: float) -> None:
        self.inner, self.name, self.value = inner, name, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def weight(self, name: str) -> np.ndarray:
        values = self.inner.weight(name)
        return np.full_like(values, self.value) if self.name in name else values

    def rows(self, name: str, low: int, high: int) -> np.ndarray:
        values = self.inner.rows(name, low, high)
        return np.full_like(values, self.value) if self.name in name else values


@pytest.mark.parametrize(
    ("name", "value", "layer"),
    [
        ("model.layers.1.self_attn.q_norm", np.nan, 2),
        ("model.layers.2.post_attention_layernorm", np.inf, 2),
        ("lm_head", 0.0, 2),
    ],
)
def test_gradients_that_say_nothing_are_refused_by_layer(
    name: str, value: float, layer: int, source: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match=f"layer {layer}: no token has a finite gradient") as refused:
        found(Broken(source, name, value), tmp_path)  # type: ignore[arg-type]
    assert "--no-sensitivity" in str(refused.value.hint)


def test_a_gradient_that_is_lost_on_the_way_back_is_refused_at_the_layer_before(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sensitivity.layer_backward

    def lost(weights: Any, cfg: Any, layer: int, *given: Any) -> torch.Tensor:
        return real(weights, cfg, layer, *given) * (torch.nan if layer == 1 else 1)

    monkeypatch.setattr(sensitivity, "layer_backward", lost)
    with pytest.raises(CalibrationError, match="layer 0: no token has a finite gradient"):
        found(source, tmp_path)


def test_tokens_without_a_gradient_are_left_out(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not finite, zero, and so long that f32 does not hold their length."""
    real = sensitivity.head_gradient

    def some(*given: Any) -> torch.Tensor:
        gradient = real(*given).clone()
        gradient[0, 0], gradient[0, 1, 3], gradient[1, 2], gradient[2, 5] = torch.nan, torch.inf, 0, 3e38
        return gradient

    monkeypatch.setattr(sensitivity, "head_gradient", some)
    monkeypatch.setattr(sensitivity, "layer_backward", lambda *given: torch.ones_like(given[4]))
    hashes = found(source, tmp_path)
    last = read_sensitivity(tmp_path, LAYERS - 1, source.config, hashes[LAYERS - 1])
    assert last.tokens == TOKENS.size - 4 and np.isfinite(last.moment).all()
    assert np.trace(last.moment) == pytest.approx(1, abs=1e-5)


def test_the_first_sequences_are_enough() -> None:
    many = np.zeros((3 * SENSITIVITY_TOKENS // 1000, 1000), np.int32)
    taken = first_tokens(many)
    assert SENSITIVITY_TOKENS <= taken.size < SENSITIVITY_TOKENS + 1000
    assert sensitivity_record(many) == {"sensitivity": {"tokens": taken.size}}
    assert len(first_tokens(TOKENS)) == len(TOKENS)
