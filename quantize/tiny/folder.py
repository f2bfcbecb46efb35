"""Where the tiny checkpoint lies, and the dimensions that it has.

Light to import: torch is loaded only when the checkpoint has to be made, so that commands which only need its
config.json start at once.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...formats.cache import places, private
from ...formats.errors import CheckpointError
from .tokenizer import SPECIAL

VERSION = 4
"""Raise it with every change that alters a byte of the result: it names the cache folder."""


@dataclass(frozen=True)
class TinySpec:
    """The dimensions of a tiny model, and how many tokens it is calibrated and judged with."""

    hidden_size: int = 512
    intermediate_size: int = 512
    num_hidden_layers: int = 2
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    num_local_experts: int = 16
    num_experts_per_tok: int = 8
    vocab_size: int = 640
    calib_shape: tuple[int, int] = (8, 256)
    eval_shape: tuple[int, int] = (8, 128)

    def config(self) -> dict[str, Any]:
        """The config.json of this model, with the keys of the released one."""
        dimensions = {k: v for k, v in asdict(self).items() if not k.endswith("_shape")}
        return {
            "architectures": ["MiniMaxM2ForCausalLM"],
            "model_type": "minimax_m2",
            **dimensions,
            "head_dim": 128,
            "rotary_dim": 64,
            "rope_theta": 5000000,
            "rms_norm_eps": 1e-06,
            "max_position_embeddings": 4096,
            "hidden_act": "silu",
            "use_qk_norm": True,
            "qk_norm_type": "per_layer",
            "use_routing_bias": True,
            "scoring_func": "sigmoid",
            "shared_intermediate_size": 0,
            "tie_word_embeddings": False,
            "use_mtp": True,
            "num_mtp_modules": 3,
            "bos_token_id": None,
            "eos_token_id": self.vocab_size - len(SPECIAL),
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "float8_e4m3fn",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
                "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
            },
        }


def ensure_tiny() -> Path:
    """The folder of the tiny checkpoint in the user's cache, made (in about ten seconds) when it is not there."""
    cache = next((place for place in places() if private(place)), None)
    if cache is None:
        raise CheckpointError(
            "the tiny checkpoint has no place: no cache folder can be written",
            hint="point XDG_CACHE_HOME at a folder that you can write",
        )
    key = hashlib.sha256(repr((VERSION, TinySpec())).encode()).hexdigest()[:12]
    folder = cache / f"tiny-{key}"
    if not folder.is_dir():
        unfinished = Path(tempfile.mkdtemp(prefix=".tiny-", dir=cache))
        try:
            from .checkpoint import write_tiny

            write_tiny(unfinished, TinySpec())
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same bytes
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder
