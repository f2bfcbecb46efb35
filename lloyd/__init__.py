"""From rotated rows to codes and levels: numbers only, in loops that numba compiles.

The loops work on *lanes*: blocks [256, 16] hold one group of 16 rows, row index last, so that every inner loop runs
over the 16 rows. No sum ever crosses lanes, hence the result does not depend on the width of the machine's vectors.
Other rooms use `encode`, `hessian`, the formats' type in `group_fit`, and the numbers in `constants`.
"""
