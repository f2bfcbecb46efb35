"""Levels of one group: k-means for codebooks, the search for grids, and refits under a Hessian.

All levels are rounded to their stored precision before codes are chosen.
"""
