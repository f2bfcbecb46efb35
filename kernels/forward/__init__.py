"""Products, norms, attention and routing of the forward pass, straight from packed weights.

`ops` has a function for each kernel, which checks shapes and chooses the grid; `geometry` has the numbers that kernels
and host share. Other rooms use `ops`.
"""
