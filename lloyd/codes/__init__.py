"""Codes of one group for given levels: rounding with error feedback, then descent from the codes that are there.

In feedback, a column's error moves the targets of later columns; in descent, each column takes the level that is best
given all others. Other rooms use only the table of shakes, for the encoder's kernels.
"""
