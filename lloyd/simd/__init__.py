"""Vectors and lanes: the ground on which the compiled loops stand.

A lane is one of sixteen rows; no sum ever crosses lanes, so results do not depend on the width of the machine's
vectors.
"""
