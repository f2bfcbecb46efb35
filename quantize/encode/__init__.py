"""Experts of one layer from f32 weights to payloads, on the CPU or on a GPU, with the same bytes."""
