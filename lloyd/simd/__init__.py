"""Vectors and lanes, of which the compiled loops are made.

A lane is one of sixteen rows. No sum crosses lanes, so results do not depend on the width of the machine's vectors.
Nothing of this shelf is used by other rooms.
"""
