"""The Hessian of rounding errors in the stored basis: of one group, and of a whole row of several groups.

Factors are f64, made in a fixed order, and stored as f32.
"""
