"""Judging a built file: structure, decode parity, fidelity, forward. Imports kernels, awq and formats."""
