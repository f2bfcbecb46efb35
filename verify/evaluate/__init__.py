"""How far models are from a reference: layer by layer, and at the head over a part of the vocabulary at a time."""

HEAD_ROWS = 1 << 12
"""Rows of the vocabulary that are taken at a time, of each model."""
