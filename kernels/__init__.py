"""HIP kernels that decode and run HFQ files, and the host that compiles and launches them. Imports formats only."""
