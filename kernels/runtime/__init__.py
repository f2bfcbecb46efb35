"""Compiling and launching kernels: one host, and a back end each for AMD, NVIDIA and the CPU.

Compiled code is cached under the hash of everything that decides it. Headers that stand in for the vendors' are in
`include`.
"""
