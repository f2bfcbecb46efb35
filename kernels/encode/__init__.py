"""The encoder on a device: the loops of the room `lloyd` as kernels that write the same bytes.

Every sum is taken in the order of the CPU's loops. Numbers come from `lloyd.constants`, and the shapes of blocks from
`geometry`, for the kernels as a header. Other rooms use `device_encoder.DeviceEncoder`.
"""
