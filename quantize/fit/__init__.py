"""Bits where they count: what each piece of a model loses in each format, and the best formats for so many bytes."""
