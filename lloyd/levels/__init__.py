"""Levels of one group: exact k-means for codebooks, a search for grids, and refits of both under a Hessian.

Levels are f32 here; `lloyd.encode` rounds them to the precision in which the file stores them. Nothing of this shelf is
used by other rooms but the initial quantiles of k-means, which the encoder's kernels begin with too.
"""
