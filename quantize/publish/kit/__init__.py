"""The conformance kit: small models of full width, what they must give, and a runner that names faults of an engine.

`shapes` says which models there are, `weights` makes their files, `suspects` computes what known faults would give,
`vectors` single products, `make` writes the kit, and `judge` runs our own kernels over it. `check_kit` is the runner:
one file of the standard library alone, which goes into the kit as it is.
"""
