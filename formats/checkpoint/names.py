"""The names of a checkpoint's files. Light to import, so that a plan of a config.json loads no reader of weights."""

from __future__ import annotations

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
SIDE_FILES = (TOKENIZER, "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
"""The texts beside the weights that go into a file."""
