"""The Hessian of rounding errors in the stored basis: of one group, and of a whole row of several groups.

Factors are computed in f64 in a fixed order, and stored as f32. Other rooms use `row.RowHessian`, `row.from_weights`
and `row.from_moment`.
"""
