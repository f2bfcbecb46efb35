"""Codes of one group for given levels: rounding with error feedback, and descent from the codes that stand."""
