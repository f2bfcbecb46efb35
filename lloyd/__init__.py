"""From rotated groups to codes and levels: pure numeric kernels, compiled with numba. Imports formats only.

The rounding kernels work on *lanes*: blocks [256, 16] holding one group of 16 rows, row index last, so that every
inner loop runs over the 16 rows. No sum ever crosses lanes, hence the result does not depend on the width of the
machine's vectors.
"""
