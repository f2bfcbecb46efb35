"""Experts whose inputs lie on a device of torch's: their moments, factors and products are made there, from the numbers
that `awq`, `lloyd.hessian` and `encode.answering` state, and rounded by the encoder there.

The sums are those of the CPU's way in another order, so the bytes are not the CPU's. For given factors they are.
`layer.DeviceLayerEncoder` is what the pipeline uses; `kept.KeptOnDevice` is the importance that it works with.
"""
