"""Compiling and launching kernels: one interface, and a back end each for AMD, NVIDIA and the CPU.

Compiled code is kept under the hash of everything that it depends on. `include` holds headers that take the place of
the vendors', and `block_table` the numbers of the block formats. Other rooms use `host.open_backend`.
"""
