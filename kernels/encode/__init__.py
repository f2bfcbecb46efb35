"""The encoder on a device: the same loops as in the room `lloyd`, as kernels, with the same bytes."""
