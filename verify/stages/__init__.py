"""The stages of `verify`, each one judgement: structure, decode parity, fidelity, forward parity, generation."""
