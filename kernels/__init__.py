"""The HIP kernels and the host that compiles and launches them. Imports formats only."""
