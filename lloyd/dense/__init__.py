"""Codes and levels of one group under a dense H, for sixteen rows at a time.

Products with H are what costs most, and hardly any is needed: for each row, `sums` keeps the sums of H's rows by code,
and follows the columns that move. Refits and pulls come from those. Other rooms use nothing of this.
"""
