"""The HFQ container: the layout of its bytes, and reading and writing whole files.

`layout` knows every offset before the first payload exists. `container` reads a file and refuses one that does not
hold.
"""
